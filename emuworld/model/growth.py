"""More layers for a trained transformer, without forgetting anything.

A new layer is a copy of the one below it whose two output projections are zero: it adds nothing to the
residual stream until it has learnt something, so the grown model begins where the trained one was (block
expansion as in LLaMA Pro, arXiv:2401.02415).
"""

import dataclasses

import torch

from emuworld.model.transformer import Transformer

_OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def deepened(model: Transformer, num_layers: int) -> Transformer:
    """A transformer of `num_layers` layers that computes what `model` does; shares no memory with it.

    New layers are spread evenly, each above the layer it copies. Raises ValueError for fewer layers than the
    model has.
    """
    old_layers = model.config.num_layers
    if num_layers < old_layers:
        raise ValueError(
            f"num_layers={num_layers}, but the model has {old_layers} layers: expected as many or more"
        )
    sources = [layer * old_layers // num_layers for layer in range(num_layers)]
    old = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    new = {name: tensor.clone() for name, tensor in old.items() if not name.startswith("model.layers.")}
    for layer, source in enumerate(sources):
        added = layer > 0 and sources[layer - 1] == source
        prefix = f"model.layers.{source}."
        for name in (name.removeprefix(prefix) for name in old if name.startswith(prefix)):
            tensor = old[prefix + name]
            silent = added and name in _OUTPUTS
            new[f"model.layers.{layer}.{name}"] = torch.zeros_like(tensor) if silent else tensor.clone()
    with torch.device("meta"):
        grown = Transformer(dataclasses.replace(model.config, num_layers=num_layers))
    grown.load_state_dict(new, assign=True)
    grown.tie_weights()
    return grown.train(model.training)
