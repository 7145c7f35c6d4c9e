"""The OpenAPI document of marnet-serve against the server, by schemathesis."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from serving import Played, running

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]
MODEL, VERSION = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
OPERATIONS = (
    *(("/predict", "POST"), ("/healthz", "GET"), ("/readyz", "GET"), ("/metrics", "GET")),
    *(("/v2", "GET"), ("/v2/health/live", "GET"), ("/v2/health/ready", "GET")),
    *((f"{base}{end}", "GET") for base in (MODEL, VERSION) for end in ("", "/ready")),
    *((f"{base}/infer", "POST") for base in (MODEL, VERSION)),
)
IN_THE_PATH = {"name": "digits", "version": "1"}


@pytest.fixture(scope="module")
def schema():
    with running(Played, images=4) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_route_is_in_the_document(schema):
    described = {
        (path, method.upper())
        for path, methods in schema.raw_schema["paths"].items()
        for method in methods
    }
    assert described == set(OPERATIONS)


@pytest.mark.parametrize("mode", GenerationMode)
# What fits a schema takes long to be found, so there are fewer examples than elsewhere.
@settings(max_examples=settings.default.max_examples // 4, suppress_health_check=[*HealthCheck])
@given(data=st.data())
def test_every_answer_is_one_that_the_document_describes(schema, mode, data):
    path, method = data.draw(st.sampled_from(OPERATIONS))
    known = {name: value for name, value in IN_THE_PATH.items() if f"{{{name}}}" in path}
    given_path = data.draw(st.sampled_from([known or None, None]))
    strategy = schema[path][method].as_strategy(mode, path_parameters=given_path)
    data.draw(strategy).call_and_validate(checks=CHECKS)
