"""The composition root: the only place that makes and binds deployments."""

# No postponed annotations here: Serve reads the parameter's class to parse ``key=value`` words and ``args:``.

from ray.serve import Application

from serve_app.ingress import Ingress
from serve_app.scorer import MAX_ONGOING, Scorer
from serve_app.settings import Settings

HEALTH = {"health_check_period_s": 5.0, "health_check_timeout_s": 30.0}
DRAIN = {"graceful_shutdown_wait_loop_s": 0.5, "graceful_shutdown_timeout_s": 60.0}


def build(args: Settings) -> Application:
    """The whole service: ``args.ingress_replicas`` front ends over ``args.scorer_replicas`` engines.

    ``serve run serve_app.app:build model=demo``, or ``import_path`` and ``args`` in a Serve config file. Neither the
    process that builds nor the front ends load jax.
    """
    scorer = Scorer.options(  # pyright: ignore[reportUnknownMemberType]
        num_replicas=args.scorer_replicas,
        ray_actor_options={"num_cpus": args.scorer_cpus},
        max_ongoing_requests=MAX_ONGOING,
        **HEALTH,
        **DRAIN,
    )
    ingress = Ingress.options(  # pyright: ignore[reportUnknownMemberType]
        num_replicas=args.ingress_replicas,
        ray_actor_options={"num_cpus": args.ingress_cpus},
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=4 * MAX_ONGOING,
        **HEALTH,
        **DRAIN,
    )
    return ingress.bind(args, scorer.bind(args))
