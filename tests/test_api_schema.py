"""Whatever a request holds, the server answers as its own schema says, and never with a 500."""

import pytest
from hypothesis import HealthCheck, given, settings

from chatglm.building import load_for_inference

from .test_api import is_ready, load_of, running
from .tiny_weights import write_weights

schemathesis = pytest.importorskip("schemathesis")
CALLS = [
    ("/", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/models", "GET"),
    ("/health", "GET"),
    ("/ready", "GET"),
    ("/metrics", "GET"),
]


@pytest.fixture(scope="module")
def schema(tmp_path_factory):
    folder = str(write_weights(tmp_path_factory.mktemp("schema"), std=0.36))
    model, tokenizer = load_for_inference(folder, precision="32", device="cpu")
    with running(model, tokenizer, max_total_tokens=24) as (served, address):
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")
        assert is_ready(address) and load_of(served) == (0, 64)


def test_the_schema_has_the_calls_that_are_tried(schema):
    there = {(one.ok().path, one.ok().method.upper()) for one in schema.get_all_operations()}
    assert there == set(CALLS)


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
@pytest.mark.parametrize(("path", "method"), CALLS)
def test_no_request_breaks_the_server(schema, path, method, mode):
    operation, checks = schema[path][method], schemathesis.checks
    if mode == "NEGATIVE" and method == "GET":
        pytest.skip("takes nothing that could be wrong")
    seen = set()

    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
    def try_it(case):
        response = case.call_and_validate(
            checks=[checks.not_a_server_error, checks.status_code_conformance], timeout=30
        )
        seen.add(response.status_code)

    try_it()
    assert (200 if mode == "POSITIVE" else 400) in seen
