"""The CPU's products with packed weights: against fp64, without a compiler, and in the model."""

import subprocess

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from chatglm.decoding import generate_tokens
from chatglm.kernels import cpu
from chatglm.quantization.linear import QuantizedLinear, dequantize_rows, unpack_int4
from chatglm.sampling import Sampling

from .conftest import load

SHAPES = [(131, 4096), (33, 16384), (31, 64), (45, 130), (57, 256)]
TRUE_SHAPES = [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def fresh_library():
    """What the tests load or fail to load is forgotten behind them."""
    yield
    cpu._library.cache_clear()


@pytest.fixture(params=["as the CPU can", "without products of bytes"])
def library(request, monkeypatch):
    """The compiled source, in both of its ways."""
    if request.param != "as the CPU can":
        monkeypatch.setattr(cpu, "FLAGS", (*cpu.FLAGS, "-DVNNI=0"))
    cpu._library.cache_clear()
    assert cpu._library() is not None
    yield cpu._library()
    cpu._library.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A machine that has no compiler and has never compiled."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("CHATGLM_KERNEL_CACHE", str(tmp_path / "kernels"))
    cpu._library.cache_clear()
    yield
    cpu._library.cache_clear()


@pytest.fixture
def poisoned(monkeypatch):
    """New memory holds NaN, so that what is not written shows."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *shape, **kind: empty(*shape, **kind).fill_(torch.nan)
    )


def packed_linear(bits, outputs, columns, dtype):
    """A linear of random bytes and scales."""
    linear = QuantizedLinear(columns, outputs, bits)
    linear.weight.random_(-128, 128)
    linear.weight_scale = (torch.rand(outputs) + 0.1).mul_(0.01).half()
    linear.bias.data = torch.randn(outputs).to(dtype)
    return linear


def exact_matrix(linear):
    """Its weight in fp64."""
    values = unpack_int4(linear.weight) if linear.bits == 4 else linear.weight
    return values.double() * linear.weight_scale.double()[:, None]


def error_against(exact, product):
    return ((product.double() - exact).norm() / exact.norm()).item()


def check_error(product, plain, exact, terms):
    """The product's error is no larger than torch's.

    Beside that a sixteenth of a rounding is allowed for chance, and fp32's for the order of sums.
    """
    order = 1e-7 * (terms.norm() / exact.norm()).item()
    bound = error_against(exact, plain) + torch.finfo(plain.dtype).eps / 16 + order
    assert error_against(exact, product) <= bound


def check_product(linear, x, *, rows=slice(None), rounded=None):
    """No worse than torch's product with the rounded weight, on the rows (or all)."""
    with torch.no_grad():
        product = linear(x)
    matrix, bias = exact_matrix(linear)[rows], linear.bias[rows]
    exact = x.double() @ matrix.T + bias.double()
    plain = F.linear(x, matrix.to(x.dtype) if rounded is None else rounded, bias)
    assert product.dtype == x.dtype
    terms = x.double().abs() @ matrix.T.abs() + bias.double().abs()
    check_error(product[..., rows], plain, exact, terms)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_as_exact_as_torch_with_the_dequantised_weight(
    library, poisoned, bits, dtype, shape
):
    linear = packed_linear(bits, *shape, dtype)
    for rows in (1, 3, cpu.MOST_ROWS[torch.int8], cpu.MOST_ROWS[torch.int8] + 1):
        check_product(linear, torch.randn(rows, shape[1]).to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", TRUE_SHAPES)
def test_products_of_the_true_shapes_are_exact(poisoned, bits, shape):
    rows = torch.cat((torch.tensor([0, shape[0] - 1]), torch.randint(shape[0], (100,))))
    linear = packed_linear(bits, *shape, torch.bfloat16)
    x = torch.randn(1, 1, shape[1]).bfloat16()
    check_product(linear, x, rows=rows)
    with torch.no_grad():
        assert linear(x).isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_large_number_does_not_drown_the_others(library, bits, dtype):
    linear = packed_linear(bits, 40, 4096, dtype)
    x = torch.randn(2, 4096)
    x[0, 17], x[1, 4095] = 60, -1000
    check_product(linear, x.to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_give_the_bias_and_broken_numbers_stay_broken(library, bits):
    linear, x = packed_linear(bits, 9, 256, torch.float32), torch.zeros(3, 256)
    x[1, 3], x[2, 4] = torch.nan, torch.inf
    linear.weight.fill_(0x11)
    with torch.no_grad():
        product = linear(x)
    assert torch.equal(product[0], linear.bias)
    assert not product[1:].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_plain_head_in_half_precision_is_as_exact_as_torch(library, poisoned, dtype):
    head = nn.Linear(4096, 131, bias=False).to(dtype)
    head.weight.data[:, ::7] *= 1e-3  # down to the smallest numbers of fp16
    x = torch.randn(1, 2, 4096).to(dtype)
    exact = x.double() @ head.weight.double().T
    terms = x.double().abs() @ head.weight.double().T.abs()
    with torch.no_grad():
        product, plain = cpu.apply_linear(head, x), head(x)
    assert product.shape == plain.shape and product.dtype == plain.dtype
    check_error(product, plain, exact, terms)


def test_a_hook_on_the_head_is_obeyed():
    head, seen = nn.Linear(64, 8).bfloat16(), []
    head.register_forward_hook(lambda module, given, output: seen.append(output))
    with torch.no_grad():
        cpu.apply_linear(head, torch.randn(1, 64).bfloat16())
    assert len(seen) == 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantising_rounds_each_weight_once(library, poisoned, bits, dtype, shape):
    linear = packed_linear(bits, *shape, dtype)
    linear.weight_scale[0] = 3e-7  # among the smallest numbers of fp16
    matrix = dequantize_rows(linear.weight, linear.weight_scale, bits, dtype)
    assert torch.equal(matrix, exact_matrix(linear).to(dtype))


def test_the_threads_are_those_of_torch():
    def pools():
        with open("/proc/self/maps") as file:
            return {line.split()[-1] for line in file if "omp" in line.split("/")[-1]}

    before = pools()
    cpu._library.cache_clear()
    with torch.no_grad():
        packed_linear(4, 300, 256, torch.float32)(torch.randn(1, 256))
    assert pools() == before


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_compiler_products_are_the_same_and_the_reason_is_said_once(
    no_compiler, caplog, bits, dtype
):
    linear = packed_linear(bits, 131, 256, dtype)
    rounded = dequantize_rows(linear.weight, linear.weight_scale, bits, dtype)  # scales as well
    for rows in (1, 1, 40):
        check_product(linear, torch.randn(rows, 256).to(dtype), rounded=rounded)
    assert len(caplog.messages) == 1
    assert "a C compiler is not to be found; install gcc" in caplog.messages[0]


def test_a_compiler_that_refuses_is_named_with_its_complaint(no_compiler, monkeypatch, caplog):
    monkeypatch.undo()
    monkeypatch.setattr(cpu, "FLAGS", (*cpu.FLAGS, "-fno-such-flag"))
    check_product(packed_linear(4, 8, 256, torch.float32), torch.randn(1, 256))
    assert len(caplog.messages) == 1
    assert "does not compile cpu.c" in caplog.messages[0] and "-fno-such-flag" in caplog.text


def test_it_is_compiled_once_a_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("CHATGLM_KERNEL_CACHE", str(tmp_path / "kernels"))
    cpu._load()
    (kept,) = (tmp_path / "kernels").iterdir()
    monkeypatch.setattr(subprocess, "run", None)
    cpu._load()
    assert [kept] == list((tmp_path / "kernels").iterdir())


def test_a_folder_that_cannot_be_written_only_costs_the_compiling(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CHATGLM_KERNEL_CACHE", str(tmp_path / "file" / "kernels"))
    assert cpu._load().multiply


@pytest.mark.parametrize("bits", [4, 8])
def test_what_needs_a_gradient_is_multiplied_as_before(monkeypatch, bits):
    monkeypatch.setattr(cpu, "multiply", None)
    linear = packed_linear(bits, 12, 64, torch.float32)
    x = torch.randn(3, 64, requires_grad=True)
    linear(x).sum().backward()
    assert torch.allclose(x.grad, exact_matrix(linear).float().sum(0).expand_as(x), atol=1e-5)
    assert torch.equal(linear.bias.grad, torch.full((12,), 3.0))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_released_tokens_come_out_both_ways(library, golden_folder, quantized_folders, bits):
    check_tokens(golden_folder, quantized_folders, bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_released_tokens_come_out_without_a_compiler(
    no_compiler, golden_folder, quantized_folders, bits
):
    check_tokens(golden_folder, quantized_folders, bits)


def check_tokens(golden_folder, quantized_folders, bits):
    expected = load_file(golden_folder / f"int{bits}.safetensors")
    ids, wanted = expected["greedy.input_ids"], expected["greedy.output_ids"]
    tokens = generate_tokens(
        load(quantized_folders[bits]), ids, max_new_tokens=wanted.shape[1] - ids.shape[1],
        sampling=Sampling(do_sample=False), eos_token_ids=[305],
    )  # fmt: skip
    assert torch.equal(torch.cat((ids, torch.stack(list(tokens), dim=1)), dim=1), wanted)
