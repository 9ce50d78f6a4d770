"""Seconds of a guided picture that is drawn at once, with random weights of a named size.

./run python scripts/measure_refinement.py --size emu3.5 --side 64 --passes 8    # 34 B, 1024 px
./run python scripts/measure_refinement.py --size tiny --device cpu --side 8      # does it run?

Refinement alone: no words, no vision decoder. Noise costs what a picture costs. What counts is the second
of two runs, whose kernels are compiled.
"""

import argparse
import time

import torch

from emuworld.checkpoint_folder import find_device
from emuworld.decoding.autoregressive import finish
from emuworld.decoding.dida import Painter, Picture
from emuworld.decoding.noise import Noise
from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.decoding.uniforms import TokenUniforms
from emuworld.model.cache import StaticCache
from emuworld.model.fused import FusedTransformer
from emuworld.model.transformer import Transformer, sized
from emuworld.tokens.vocabulary import EMU35

PROMPT_TOKENS = 64
CODE_LENGTH = 256  # of the published codebook's vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="emu3.5")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--side", type=int, default=64, help="of a picture, in codes of 16 pixels")
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--guided-until", type=float, default=1.0, help="1: every pass takes two rows")
    options = parser.parse_args()
    device = find_device(options.device)
    model = random_model(options.size, device=device)
    painter = Painter(
        model, vocabulary=EMU35, noise=Noise(), codebook_KE=torch.zeros(EMU35.num_visual_tokens, CODE_LENGTH)
    )
    sampling = Sampling(
        image=Truncation(top_k=5120), guidance=5.0, passes=options.passes, guided_until=options.guided_until
    )
    rows = 2 * options.pictures
    cache = StaticCache(
        model.config,
        num_rows=rows,
        capacity=PROMPT_TOKENS + options.side * (options.side + 1),
        device=device,
        dtype=model.dtype,
    )
    model(torch.zeros((rows, PROMPT_TOKENS), dtype=torch.int64, device=device), cache=cache)
    pictures = [
        Picture(
            rows=(at, options.pictures + at),
            size=(options.side, options.side),
            index=0,
            uniforms=TokenUniforms(seed=at, step=0),
            sampling=sampling,
        )
        for at in range(options.pictures)
    ]
    times = [seconds(painter, cache, pictures) for _ in range(2)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{options.size}, {name}, torch {torch.__version__}")
    print(
        f"{options.pictures} guided pictures of {16 * options.side} px in {options.passes} passes: "
        f"{times[1]:.2f} s (first run {times[0]:.2f} s), {1e3 * times[1] / options.passes:.0f} ms a pass"
    )


def random_model(size: str, *, device: torch.device) -> FusedTransformer:
    with torch.device("meta"):
        config = sized(size, vocab_size=EMU35.size, tie_word_embeddings=False)
        model = Transformer(config).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    model.init_weights(torch.Generator(device).manual_seed(0))
    return FusedTransformer(model)


def seconds(painter: Painter, cache: StaticCache, pictures: list[Picture]) -> float:
    start_s = time.perf_counter()
    with torch.inference_mode():
        finish(painter.paint(cache, pictures))  # type: ignore[arg-type]  # codes on the host: it has waited
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
