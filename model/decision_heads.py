"""Heads that score a question's options by hidden states, where a language model is read for its next token.

Each option is read at one token and the question at the sequence's last: its *query*. A head is float32 whatever the
weights' dtype. What it makes of one hidden state is computed on the device; its *features* are the projections of the
state as an option and as a query. The host puts an option's and its query's together, since the two may come from
different calls. An encoder's options have seen the question: a state's one feature is the option's logit.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jaxtyping import Array, Float
from scipy.special import erf

from model.checkpoint import Target
from model.config import DecisionHead, ModelConfig
from model.cpu import linear
from model.fields import ConfigError
from model.layers import Linear, activate, each, row_dots, standardized
from model.tensors.folder import HEAD_FILE, HEAD_PREFIX
from model.tensors.stored import Tensors

_NORM_EPS = 1e-5

_SIGNS: tuple[tuple[Literal["candidate", "pointer"], str], ...] = (("candidate", "key.weight"), ("pointer", "k.weight"))
"""Each kind of head, and a tensor that the others have not: [head width, D]."""


def of(tensors: Tensors) -> DecisionHead | None:
    """The head that is stored; None: there is none.

    Raises:
        ConfigError: it is of a kind that is not implemented.
    """
    own = sorted(name.removeprefix(HEAD_PREFIX) for name in tensors if name.startswith(HEAD_PREFIX))
    if not own:
        return None
    for kind, sign in _SIGNS:
        if sign in own:
            return DecisionHead(kind, tensors[HEAD_PREFIX + sign].shape[0])
    raise ConfigError(
        f"{HEAD_FILE} has the tensors {', '.join(own)}: a head of a kind that is not implemented. Known are the "
        "candidate head of Decision 2.0 (key, query, candidate_mlp, ...) and pointer heads (q, k)"
    )


class Norm(nnx.Module):
    """Layer norm in float32."""

    def __init__(self, config: ModelConfig) -> None:
        self.native = config.native
        self.scale = nnx.Param(jnp.zeros((config.width,), jnp.float32), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros((config.width,), jnp.float32), axes=("embed",))

    def __call__(self, x: Float[Array, "R D"]) -> Float[Array, "R D"]:
        if self.native:
            return linear.layer_norms(x, self.scale[...], self.bias[...], _NORM_EPS)
        return standardized(x, _NORM_EPS, native=False) * self.scale[...][None, :] + self.bias[...][None, :]


def _linear(config: ModelConfig, width: int, *, bias: bool) -> Linear:
    return Linear(
        config.width, width, bias=bias, dtype=jnp.dtype("float32"), axes=("embed", "embed"), packed=config.native
    )


class CandidateHead(nnx.Module):
    """Decision 2.0's: with c and q the layer norms of an option's state and of the query's, (K c)(Q q) / sqrt(W) +
    w gelu(M c + b + N q).

    Source: CandidateHead in vllm-project/semantic-router, src/model-runtime/vllm_sr_runtime/families/decision2/
    readout.py at 785c6e8.
    """

    def __init__(self, config: ModelConfig, width: int) -> None:
        self.candidate_norm, self.query_norm = Norm(config), Norm(config)
        self.key, self.query = _linear(config, width, bias=False), _linear(config, width, bias=False)
        self.candidate_mlp, self.query_mlp = _linear(config, width, bias=True), _linear(config, width, bias=False)
        self.scalar = nnx.Param(jnp.zeros((1, width), jnp.float32), axes=(None, "embed"))

    def __call__(self, hidden: Float[Array, "R D"]) -> Float[Array, "R features"]:
        candidate, query = self.candidate_norm(hidden), self.query_norm(hidden)
        of_option = each((self.key, self.candidate_mlp), candidate)
        return jnp.concatenate([*of_option, *each((self.query, self.query_mlp), query)], axis=1)


class PointerHead(nnx.Module):
    """That of kev, any2jev and others: (K o + k)(Q d + q) / sqrt(W), of an option's state o and the query's d.

    Source: PointerHead in jaredpalmer/kev, kev/model.py at 04f48a2.
    """

    def __init__(self, config: ModelConfig, width: int) -> None:
        self.k, self.q = _linear(config, width, bias=True), _linear(config, width, bias=True)

    def __call__(self, hidden: Float[Array, "R D"]) -> Float[Array, "R features"]:
        return jnp.concatenate(each((self.k, self.q), hidden), axis=1)


class MarkerHead(nnx.Module):
    """Laya's: w gelu(M m + b) + c, with m the layer norm of the state at an option's marker.

    Source: DecisionModel.scorer in NandhaKishorM/laya, laya/common.py at 8ef5b2d.
    """

    def __init__(self, config: ModelConfig, width: int) -> None:
        self.native = config.native
        self.marker_norm, self.dense = Norm(config), _linear(config, width, bias=True)
        self.scalar = nnx.Param(jnp.zeros((1, width), jnp.float32), axes=(None, "embed"))
        self.bias = nnx.Param(jnp.zeros((1,), jnp.float32), axes=(None,))

    def __call__(self, hidden: Float[Array, "R D"]) -> Float[Array, "R features"]:
        mixed = activate(self.dense(self.marker_norm(hidden)), "gelu")
        return (row_dots(mixed, jnp.broadcast_to(self.scalar[...], mixed.shape), native=self.native) + self.bias)[
            :, None
        ]


Heads = CandidateHead | PointerHead | MarkerHead
_CLASSES = {"candidate": CandidateHead, "pointer": PointerHead, "marker": MarkerHead}


def build(config: ModelConfig) -> Heads | None:
    """A model's head with zero weights; None: it has none."""
    if (head := config.decision_head) is None:
        return None
    return _CLASSES[head.kind](config, head.width)


def table(config: ModelConfig) -> dict[str, Target]:
    """Each of the tensors of a head's own file -> where it goes."""
    if (head := config.decision_head) is None or head.kind == "marker":  # its family has the table
        return {}
    if head.kind == "pointer":
        linears, biased = ("k", "q"), ("k", "q")
    else:
        linears, biased = ("key", "query", "candidate_mlp", "query_mlp"), ("candidate_mlp",)
    found = {f"{n}.weight": Target((n, "kernel"), (head.width, config.width), "transpose") for n in linears}
    found |= {f"{n}.bias": Target((n, "bias"), (head.width,), "same") for n in biased}
    if head.kind == "candidate":
        for norm in ("candidate_norm", "query_norm"):
            found[f"{norm}.weight"] = Target((norm, "scale"), (config.width,), "same")
            found[f"{norm}.bias"] = Target((norm, "bias"), (config.width,), "same")
        found["scalar.weight"] = Target(("scalar",), (1, head.width), "same")
    return {HEAD_PREFIX + n: Target(("decision_head", *t.path), t.shape, t.transform) for n, t in found.items()}


def features_of(head: DecisionHead) -> int:
    """How many features a hidden state has."""
    return {"candidate": 4 * head.width, "pointer": 2 * head.width, "marker": 1}[head.kind]


def logits(
    head: DecisionHead,
    scalar: npt.NDArray[np.float32] | None,
    options: npt.NDArray[np.float32],
    queries: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """The logit of each option, from its features and those of its query. Each has the same bits whatever the others.

    Args:
        scalar: ``CandidateHead.scalar``.
        options: [n, features].
        queries: the same.
    """
    if head.kind == "marker":
        return options[:, 0]
    half = options.shape[1] // 2
    own, asked = options[:, :half].astype(np.float64), queries[:, half:].astype(np.float64)
    width = head.width
    found = (own[:, :width] * asked[:, :width]).sum(axis=1) / np.sqrt(width)
    if scalar is not None:
        mixed = own[:, width:] + asked[:, width:]
        found += (0.5 * mixed * (1 + erf(mixed / np.sqrt(2))) * scalar.reshape(1, -1)).sum(axis=1)
    return found.astype(np.float32)
