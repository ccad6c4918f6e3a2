"""``GET /v1/info``: what is served, and the limits of a request."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app import __version__
from serve_app.frontend.service import ModelService
from serve_app.schemas import InfoResponse, LimitsInfo, MemoryInfo, MeshInfo


def info(service: ModelService, names: Sequence[str]) -> InfoResponse:
    """Describe a served model and the limits of its requests.

    Args:
        names: all names of the model.
    """
    settings, model = service.settings, service.model
    facts, limits = model.info, settings.limits
    return InfoResponse(
        model=settings.name,
        names=list(names),
        adapters=sorted(settings.adapters) or None,
        architecture=facts.architecture,
        context_length=facts.context_length,
        vocab_size=facts.vocab_size,
        classes=facts.classes,
        pad_token_id=facts.pad_token_id,
        dtype=facts.dtype,
        dtype_reason=settings.dtype_reason(facts.platform),
        quantization=facts.quantization,
        platform=facts.platform,
        buckets=list(facts.buckets),
        notes=list(facts.notes) or None,
        decision_head=facts.decision_head,
        decision_profile=model.profile.name if model.can_decide else None,
        calibration=None if model.calibration is None else model.calibration.name,
        rerank_template=model.rerank.name if model.can_rerank else None,
        limits=LimitsInfo(
            max_items=limits.max_items,
            max_labels=limits.max_labels,
            max_body_bytes=limits.max_body_bytes,
            max_prompt_tokens=model.max_prompt_tokens,
            max_text_characters=model.max_text_characters,
            max_request_tokens=limits.max_request_tokens,
            max_queued_tokens=service.queued_tokens,
            timeout_s=settings.timeout_s,
        ),
        memory=None
        if facts.memory is None
        else MemoryInfo(
            weights_bytes=facts.memory.weights,
            workspace_bytes=facts.memory.workspace,
            pages_bytes=facts.memory.pages,
            page_tokens=facts.memory.page_tokens,
            free_bytes=facts.memory.free,
        ),
        mesh=None if facts.mesh is None else MeshInfo(data=facts.mesh[0], model=facts.mesh[1]),
        version=__version__,
    )
