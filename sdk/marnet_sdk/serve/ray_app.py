"""A Ray Serve application that answers as `marnet-serve` does, with as many replicas as it needs.

    serve run marnet_sdk.serve.ray_app:build model=/models/digits-fp16.marnet

Ray imports this file by its name; nothing else does.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from marnet_sdk.errors import InvalidInput, QueueFull, brief, requires_extra
from marnet_sdk.serve.ray_worker import reserved_threads
from marnet_sdk.server.cli import PACKAGES, TOKEN, make_service, read_options, read_token

if TYPE_CHECKING:
    from ray.serve import Application

    from marnet_sdk.server.gate import Gate

NAME = "Classifier"  # of the deployment, in a configuration
_REPLICAS, _ONGOING = "1-8", 8.0  # docs/ray.md says how to choose them
# These concern a listener and its end, which are Ray's.
_OF_RAY = ("host", "port", "max_connections", "header_timeout", "drain_timeout")
_FIRST = 2**31  # a priority above those of all requests
_BLACK = np.zeros((32, 32, 3), np.uint8)


class Replica:
    """One process with a classifier of its own, and the application of `marnet-serve` around it."""

    def __init__(self, options: dict[str, Any], *, has_token: bool) -> None:
        """Open the bundle, which tests itself.

        Args:
            options: as `read_options` gives them. Without `threads`, it computes with as many as
                Ray reserved CPUs for the replica.
            has_token: where the application was built, the environment had a bearer token.

        Raises:
            InvalidInput: there was a token, and there is none here.
            MarnetError: why the bundle cannot be opened.
        """
        own: dict[str, Any] = {**options, "threads": options["threads"] or reserved_threads()}
        own["token"] = read_token(own.pop("token_file"))
        self._service = make_service(**own)
        if has_token and self._service.token is None:
            raise InvalidInput(
                f"{TOKEN} is set where the application was built, and not in the replica; set it "
                "in env_vars of the runtime_env, or name a file with token_file"
            )
        self._service.open_now()
        self._ended = -1  # requests, when the queue was last found full

    def __serve_build_asgi_app__(self) -> Gate:  # Ray asks for it, once, behind the constructor
        """Build the application, whose lifespan ends with the classifier closed."""
        from marnet_sdk.server.app import create_app

        return create_app(self._service, None)  # Ray has an access log

    async def check_health(self) -> None:
        """Classify an image ahead of all that wait. Ray replaces a replica that cannot.

        A full queue is no illness, as long as it moves.

        Raises:
            MarnetError: why no answer comes.
        """
        with self._service.using() as classifier:
            try:
                await classifier.apredict(_BLACK, top_k=1, priority=_FIRST)
            except QueueFull:
                stats = classifier.batching_stats()
                ended = stats.answered + stats.failed + stats.expired + stats.cancelled
                stuck, self._ended = ended == self._ended, ended
                if stuck:
                    raise


def build(args: Mapping[str, Any]) -> Application:
    """Build the application, for `serve run`, `serve build` or `ray.serve.run`.

    A deployment named "Classifier" has replicas that batch, refuse and answer as `marnet-serve`
    does. Ray's settings of a deployment, as in the `deployments` of a configuration, change how
    many there are and what each reserves.

    Args:
        args: `model`, the path of a bundle as every replica finds it. `replicas`, how many there
            are: a number, or the least and the most, as in "1-8", the default. `target_ongoing`,
            the requests in each from where on Ray adds replicas; default: 8. And options of
            `marnet-serve` under their names, but those of its listener; `threads` reserves as many
            CPUs for each replica; default: 1.

    Raises:
        InvalidInput: no model, no such option, or a value that is none of it.
        MissingExtra: the extra `ray` is not installed.
    """
    given = dict(args)
    scaling = _scaling(given.pop("replicas", _REPLICAS), given.pop("target_ongoing", _ONGOING))
    options = _options(given)
    with requires_extra("ray", "ray", *PACKAGES):
        import marnet_sdk.server.app  # noqa: F401, I001, before anything of Ray is started
        from ray import serve
    most = options["max_queue"]
    deployment = serve.deployment(
        name=NAME,
        # The classifier's own queue knows deadlines and operating points, so requests wait there.
        max_ongoing_requests=most,
        max_queued_requests=most,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        autoscaling_config=scaling,
        ray_actor_options={"num_cpus": options["threads"] or 1},
        graceful_shutdown_timeout_s=options["drain_timeout"],
    )
    replica = deployment(serve.ingress()(Replica))
    return replica.bind(options | {"threads": None}, has_token=TOKEN in os.environ)


def _scaling(replicas: str | int, ongoing: str | float) -> dict[str, float]:
    found = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", str(replicas).strip())
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if least > most:
        raise InvalidInput(f"replicas: got {brief(replicas)}, expected a number, or two as in 1-8")
    try:
        target = float(ongoing)
    except ValueError:
        target = math.nan
    if not 0 < target < math.inf:
        raise InvalidInput(f"target_ongoing: got {brief(ongoing)}, expected a number above 0")
    return {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": target}


def _options(args: Mapping[str, Any]) -> dict[str, Any]:
    if theirs := [name for name in args if name.replace("-", "_") in _OF_RAY]:
        raise InvalidInput(
            f"{theirs[0]}: Ray's proxies listen and end; set http_options, or "
            "graceful_shutdown_timeout_s of the deployment, in the configuration of Ray Serve"
        )
    if "processes" in args:
        raise InvalidInput("processes: Ray starts and replaces them; say how many with replicas")
    options = read_options(args)
    if options["model"] is None:
        raise InvalidInput("no model; name a bundle: model=/models/digits-fp16.marnet")
    del options["host"], options["port"], options["processes"]
    for name in ("model", "token_file"):  # replicas have another working directory
        options[name] = options[name] and options[name].absolute()
    return options
