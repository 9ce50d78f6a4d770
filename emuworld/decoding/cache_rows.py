"""The cache rows of a batch of worlds, and the hidden state behind each: what puts tokens into the model.

Which tokens go together is decided row by row, so that a row's result does not depend on the rows beside it.

Shapes: R cache rows, T tokens of one feed, D hidden size.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from emuworld.decoding.grammar import Span
from emuworld.decoding.language_model import LanguageModel
from emuworld.decoding.request import Progress
from emuworld.model.cache import StaticCache
from emuworld.model.config import TransformerConfig
from emuworld.model.exact import Chooser, ExactTransformer
from emuworld.staging import moved
from emuworld.tokens.token_ids import TokenIds

_SHORT = 2  # tokens of one feed up to which rows of any lengths go together: a token, and the EOL behind it
_GROWTH = 1.5  # a cache that a long text fills grows by this factor, so that copying it stays rare
# Rows of unequal lengths share a pass of a GPU. It is a multiple of this long: few shapes to compile for.
_LENGTH_STEP = 16
# A row is filled up by as many tokens, or by this share of the longest: less than another pass would cost.
_MOST_FILLED, _MOST_FILLED_SHARE = 32, 8
# Tokens of one pass of a GPU over many rows: more of them are no faster there, but each pass takes the host
# milliseconds. So there are more where the widest of what lies between a layer's matrices takes little.
_TOKENS_AT_ONCE, _WIDEST_BYTES = 32_768, 512 << 20


class CacheRows:
    """The cache rows of all worlds and the hidden state behind each: what puts tokens into the model.

    Args:
        layout: the rows of each world; may change between calls, where a world joins.
        like_D: any hidden state.
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: StaticCache,
        layout: Sequence[Sequence[int]],
        like_D: Tensor,
    ) -> None:
        self._model = model
        self._cache = cache
        self._layout = layout
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self.hidden_RD = like_D.new_zeros((cache.num_rows, len(like_D)))

    def begin(self, hiddens_D: Mapping[int, Tensor]) -> None:
        """Worlds join: the cache holds their prefixes, and these are the hidden states behind them."""
        rows = [row for world in hiddens_D for row in self._layout[world]]
        if rows:
            joining = [hiddens_D[world] for world in hiddens_D for _ in self._layout[world]]
            self.hidden_RD = self.hidden_RD.index_copy(0, self._index_of(rows), torch.stack(joining))

    def feed_pending(self, worlds: Mapping[int, Progress], active: Sequence[int]) -> None:
        """Put all pending tokens into the cache; rows without any keep their hidden states.

        How a row's tokens are cut into calls is the row's own affair: always all that are pending at once. A
        world that drafts reads its last tokens with its guesses, so only what comes before a picture's IMG is
        read here.
        """
        runs: dict[int, list[int]] = {}
        for i in active:
            conditional, *unguided = self._layout[i]
            runs[conditional], image_run = worlds[i].take_pending()
            runs |= dict.fromkeys(unguided, image_run)
        groups: dict[tuple[int, int], list[int]] = {}
        lengths = self._cache.lengths
        long: dict[int, list[int]] = {}
        for row in sorted(row for row, run in runs.items() if run):
            # Short runs: any rows may go together. Longer ones only from equal places, where no mask of the
            # batch can depend on the company; on a GPU, where calls are what costs, from any.
            start = int(lengths[row]) if len(runs[row]) > _SHORT else -1
            if start >= 0 and rides_along(self._model.device):
                long[row] = runs[row]
            else:
                groups.setdefault((start, len(runs[row])), []).append(row)
        for rows in groups.values():
            self._feed(rows, moved(torch.tensor([runs[row] for row in rows]), self._model.device))
        if long:
            self._feed_filled_up(long)

    def rows_of(self, members: Sequence[int]) -> tuple[list[int], Tensor]:
        """All rows of these worlds in ascending order, and where in `members` the world of each stands."""
        place = {row: at for at, i in enumerate(members) for row in self._layout[i]}
        rows = sorted(place)
        return rows, index_tensor([place[row] for row in rows], self._model.device)

    def feed_drawn(self, rows: list[int], tokens_R: Tensor) -> None:
        """Put one drawn visual token into each of these rows; nothing waits for the device."""
        self._feed(rows, tokens_R[:, None])

    def draw_ahead(
        self, rows: list[int], sources_R: Tensor, ids_WN: np.ndarray, *, span: Span, chooser: Chooser
    ) -> None:
        """Put a token into each of these rows, draw the next, and so on, in one call of the CPU form."""
        assert isinstance(self._model, ExactTransformer)
        self._reserve(ids_WN.shape[1] - 1)
        cache = self._cache if len(rows) == self._cache.num_rows else self._cache.rows(rows)
        hidden_RD = self._model.draw_ahead(
            ids_WN, sources_R.numpy(), cache=cache, start=span.start, stop=span.stop, chooser=chooser
        )
        self.hidden_RD = self.hidden_RD.index_copy(0, self._index_of(rows), hidden_RD)

    def read(self, rows: list[int], ids_RT: Tensor) -> Tensor:
        """See `drafting.WindowRows`."""
        everyone = range(self._cache.num_rows)
        rides = rides_along(self._model.device) and self.has_room(everyone, ids_RT.shape[1])
        return self._read(rows, ids_RT, rides=rides)

    def _read(self, rows: list[int], ids_RT: Tensor, *, rides: bool) -> Tensor:
        """Hidden states [rows, T, D]; with `rides`, rows between them may go along without advancing."""
        self._reserve(ids_RT.shape[1])
        if len(rows) == self._cache.num_rows:
            return self._model(ids_RT, cache=self._cache)
        neighbours = rows[-1] - rows[0] + 1 == len(rows)
        if neighbours or not rides:
            return self._model(ids_RT, cache=self._cache.rows(rows))
        index = self._index_of(rows)
        all_RT = ids_RT.new_zeros((self._cache.num_rows, ids_RT.shape[1])).index_copy_(0, index, ids_RT)
        advance_R = np.isin(np.arange(self._cache.num_rows), rows)
        return self._model(all_RT, cache=self._cache, advance_B=advance_R)[index]

    def _reserve(self, num_tokens: int) -> None:
        needed = int(self._cache.lengths.max()) + num_tokens
        if needed > self._cache.capacity:
            self._cache.reserve(max(needed, int(_GROWTH * self._cache.capacity)))

    def take_back(self, rows: Sequence[int], num_tokens: int) -> None:
        """See `drafting.WindowRows`."""
        lengths = self._cache.lengths
        for row in rows:
            self._cache.truncate(row, int(lengths[row]) - num_tokens)

    def has_room(self, rows: Sequence[int], num_tokens: int) -> bool:
        """See `drafting.WindowRows`; the context ends there too."""
        room = min(self._cache.capacity, self._cache.config.max_position_embeddings)
        return int(self._cache.lengths[list(rows)].max()) + num_tokens <= room

    def _feed(self, rows: list[int], ids_RT: Tensor) -> None:
        rides = rides_along(self._model.device) and ids_RT.shape[1] <= _SHORT
        hidden_RD = self._read(rows, ids_RT, rides=rides)[:, -1]
        if len(rows) == self._cache.num_rows:
            self.hidden_RD = hidden_RD
        else:
            self.hidden_RD = self.hidden_RD.index_copy(0, self._index_of(rows), hidden_RD)

    def _feed_filled_up(self, runs: Mapping[int, Sequence[int]]) -> None:
        """Runs of many lengths in few passes."""
        lengths = {row: len(run) for row, run in runs.items()}
        self._reserve(max(lengths.values()))
        most_tokens = tokens_at_once(self._cache.config)
        for rows, num_tokens in passes_over(lengths, cache=self._cache, most_tokens=most_tokens):
            ids_RT = filled_up([runs[row] for row in rows], num_tokens, device=self._model.device)
            starts_R = self._cache.lengths[rows]
            hidden_RTD = self._read(rows, ids_RT, rides=False)
            self._cache.rows(rows).truncate_all(starts_R + [lengths[row] for row in rows])
            last_R = index_tensor([lengths[row] - 1 for row in rows], self._model.device)
            hidden_RD = hidden_RTD[torch.arange(len(rows), device=last_R.device), last_R]
            self.hidden_RD = self.hidden_RD.index_copy(0, self._index_of(rows), hidden_RD)

    def _index_of(self, rows: Sequence[int]) -> Tensor:
        key = tuple(rows)
        if key not in self._indices:
            self._indices[key] = index_tensor(rows, self._model.device)
        return self._indices[key]


def rides_along(device: torch.device) -> bool:
    """Whether rows that have nothing to read go through the model with the others and do not advance.

    On a GPU leaving out rows from between others copies the cache of all that stay; on a CPU it saves work.
    """
    return device.type != "cpu"


def tokens_at_once(config: TransformerConfig) -> int:
    """The most tokens of one pass of a GPU."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    widest_bytes = 2 * max(2 * config.intermediate_size, heads, config.hidden_size)
    return max(_TOKENS_AT_ONCE, _WIDEST_BYTES // widest_bytes)


def passes_over(
    lengths: Mapping[int, int], *, cache: StaticCache, most_tokens: int
) -> list[tuple[list[int], int]]:
    """Rows of a cache that have so many tokens to read, in groups for one pass of a GPU each, and how many
    tokens that pass has: shorter rows are filled up, behind what is their own, and cut back afterwards.

    The cache has room for every row's own tokens. A pass has at most `most_tokens`, or one row.
    """
    starts, longest, groups = cache.lengths, 0, list[list[int]]()
    room = min(cache.capacity, cache.config.max_position_embeddings)
    for row in sorted(lengths, key=lambda row: (-lengths[row], row)):
        fits = longest - lengths[row] <= max(_MOST_FILLED, longest // _MOST_FILLED_SHARE)
        fits = fits and (len(groups[-1]) + 1) * _stepped(longest) <= most_tokens if groups else False
        if fits and starts[row] + longest <= room:
            groups[-1].append(row)
        else:
            longest = lengths[row]
            groups.append([row])
    passes = ((sorted(rows), _stepped(lengths[rows[0]])) for rows in groups)
    return [(rows, min(num_tokens, room - int(starts[rows].max()))) for rows, num_tokens in passes]


def _stepped(num_tokens: int) -> int:
    return -(-num_tokens // _LENGTH_STEP) * _LENGTH_STEP


def filled_up(runs: Sequence[Sequence[int]], num_tokens: int, *, device: torch.device) -> Tensor:
    """[runs, num_tokens] int64: their ids, and behind them any."""
    ids_RT = np.zeros((len(runs), num_tokens), dtype=np.int64)
    for ids_T, run in zip(ids_RT, runs, strict=True):
        # Numpy reads a list three times as slowly.
        ids_T[: len(run)] = run.numbers if isinstance(run, TokenIds) else array("q", run)
    return moved(torch.from_numpy(ids_RT), device)


def index_tensor(numbers: Sequence[int], device: torch.device) -> Tensor:
    return moved(torch.tensor(numbers), device)
