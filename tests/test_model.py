"""The model against the numbers of the released code, and against itself on a second road."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from chatglm.configuration import ChatGLMConfig
from chatglm.errors import ToolkitError
from chatglm.model import ChatGLMForConditionalGeneration
from chatglm.positions import find_context
from chatglm.prefix import own_gradient

from .conftest import load, write_config

PAD = 3
CACHES = (None, "static", "dynamic")


def distance(a, b):
    return (a.float() - b.float()).abs().max().item()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def greedy(model, input_ids, max_length=80, **options):
    return model.generate(input_ids, max_length=max_length, do_sample=False, **options)


def context_of(model, input_ids, attention_mask=None):
    config = model.config
    return find_context(
        input_ids,
        attention_mask,
        bos_token_id=config.bos_token_id,
        gmask_token_id=config.gmask_token_id,
        mask_token_id=config.mask_token_id,
    )


# Against the released code


@torch.no_grad()
@pytest.mark.parametrize("name", ["single", "mask", "train"])
def test_logits_are_the_released_ones(released, golden, name):
    logits = released(golden[f"{name}.input_ids"]).logits
    real = golden[f"{name}.input_ids"] != PAD  # released `train` rows end in pads
    assert distance(logits[real], golden[f"{name}.logits"][real]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["released mask", "released mask and positions", "plain mask"])
def test_logits_of_a_left_padded_batch_are_the_released_ones(released, golden, kind):
    ids = golden["left.input_ids"]
    real = ids != PAD
    options = {"attention_mask": real.long() if kind == "plain mask" else
               golden["left.attention_mask"]}  # fmt: skip
    if kind.endswith("positions"):
        options["position_ids"] = golden["left.position_ids"]
    logits = released(ids, **options).logits
    assert distance(logits[real], golden["left.logits"][real]) < 1e-4


@torch.no_grad()
def test_loss_is_the_released_one(released, golden):
    loss = released(golden["train.input_ids"], labels=golden["train.labels"]).loss
    assert abs(loss - golden["train.loss"]).item() < 1e-5


@torch.no_grad()
def test_loss_does_not_change_when_pads_of_a_batch_are_masked(released, golden):
    ids, labels = golden["train.input_ids"], golden["train.labels"]
    loss = released(ids, attention_mask=(ids != PAD).long(), labels=labels).loss
    assert abs(loss - golden["train.loss"]).item() < 1e-5


@torch.no_grad()
def test_hidden_states_are_the_released_ones(released, golden):
    states = released(golden["single.input_ids"], output_hidden_states=True).hidden_states
    expected = golden["single.hidden_states"].transpose(1, 2)  # (layers + 1, B, T, C)
    assert len(states) == len(expected)
    for layer, (state, other) in enumerate(zip(states, expected, strict=True)):
        assert distance(state, other) < 1e-4, f"layer {layer}"


def test_gradients_are_the_released_ones(released, golden, golden_folder):
    expected = load_file(golden_folder / "gradients.safetensors")
    try:
        released(golden["train.input_ids"], labels=golden["train.labels"]).loss.backward()
        gradients = {f"grad.{n}": p.grad for n, p in released.named_parameters()}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        assert relative(norm, expected.pop("grad_norm")) < 1e-4
        for name, gradient in expected.items():
            assert relative(gradients[name], gradient) < 1e-4, name
    finally:
        released.zero_grad(set_to_none=True)


@torch.no_grad()
def test_steps_into_a_cache_give_the_released_logits(released, golden):
    ids = golden["cache.input_ids"]
    context_lengths, mask_positions = context_of(released, ids)
    outputs = released(ids, use_cache=True)
    assert distance(outputs.logits[:, -1], golden["cache.step_logits"][0]) < 1e-4
    for step, token in enumerate(golden["cache.forced_tokens"]):
        outputs = released(
            token.view(1, 1),
            past_key_values=outputs.past_key_values,
            context_lengths=context_lengths,
            mask_positions=mask_positions,
            position_ids=torch.tensor([[ids.shape[1] + step]]),
        )
        assert distance(outputs.logits[:, -1], golden["cache.step_logits"][step + 1]) < 1e-4


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["greedy", "greedy_batch"])
def test_greedy_tokens_are_the_released_ones_with_every_cache(released, golden, name, cache):
    output = greedy(released, golden[f"{name}.input_ids"], cache_implementation=cache)
    assert torch.equal(output, golden[f"{name}.output_ids"])


@pytest.mark.parametrize("cache", CACHES)
def test_beams_are_the_released_ones_with_every_cache(released, golden, cache):
    output = greedy(
        released, golden["beam4.input_ids"], 40, num_beams=4, cache_implementation=cache
    )
    assert torch.equal(output, golden["beam4.output_ids"])


def test_greedy_tokens_of_a_batch_need_no_mask_and_take_the_released_one(released, golden):
    ids, expected = golden["greedy_batch.input_ids"], golden["greedy_batch.output_ids"]
    mask = golden["greedy_batch.attention_mask"]
    output = greedy(
        released, ids, attention_mask=mask, position_ids=golden["greedy_batch.position_ids"]
    )
    assert torch.equal(output, expected)


def test_prompt_lookup_gives_the_greedy_tokens(released, golden):
    output = greedy(released, golden["greedy.input_ids"], prompt_lookup_num_tokens=3)
    assert torch.equal(output, golden["greedy.output_ids"])


def test_generation_without_a_cache_gives_the_greedy_tokens(released, golden):
    ids = golden["greedy.input_ids"]
    output = greedy(released, ids, 24, use_cache=False)
    assert torch.equal(output, golden["greedy.output_ids"][:, :24])


def test_a_sharded_checkpoint_holds_the_same_model(released, sharded_folder):
    sharded = load(sharded_folder)
    for (name, a), b in zip(released.state_dict().items(), sharded.state_dict().values(),
                            strict=True):  # fmt: skip
        assert torch.equal(a, b), name


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_checkpoints_give_the_released_numbers(golden_folder, quantized_folders, bits):
    expected = load_file(golden_folder / f"int{bits}.safetensors")
    model = load(quantized_folders[bits])
    logits = model(expected["single.input_ids"]).logits
    assert distance(logits, expected["single.logits"]) < 1e-4
    output = greedy(model, expected["greedy.input_ids"])
    assert torch.equal(output, expected["greedy.output_ids"])


@pytest.mark.parametrize("projection", [False, True])
def test_prefix_encoders_give_the_released_numbers(
    golden, golden_folder, checkpoint_folder, projection
):
    name = "prefix_projection" if projection else "prefix_embedding"
    expected = load_file(golden_folder / f"{name}.safetensors")
    model = load(checkpoint_folder, pre_seq_len=6, prefix_projection=projection)
    state = {k.removeprefix("state."): v for k, v in expected.items() if k.startswith("state.")}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    ids = golden["left.input_ids"]
    real = ids != PAD
    with torch.no_grad():
        logits = model(golden["single.input_ids"]).logits
        assert distance(logits, expected["single.logits"]) < 1e-4
        logits = model(ids, attention_mask=golden["left.attention_mask"]).logits
        assert distance(logits[real], expected["left.logits"][real]) < 1e-4
        logits = model(ids, attention_mask=real.long()).logits
        assert distance(logits[real], expected["left.logits"][real]) < 1e-4
    output = greedy(model, golden["greedy.input_ids"])
    assert torch.equal(output, expected["greedy.output_ids"])
    loss = model(golden["train.input_ids"], labels=golden["train.labels"]).loss
    assert abs(loss - expected["train.loss"]).item() < 1e-5
    loss.backward()
    gradients = {f"grad.{n}": p.grad for n, p in model.named_parameters()}
    for key in (key for key in expected if key.startswith("grad.")):
        gradient = gradients[key.removesuffix("[::16]")]
        kept = gradient[::16] if key.endswith("[::16]") else gradient
        assert relative(kept, expected[key]) < 1e-4, key


@torch.no_grad()
def test_a_lora_adapter_in_pefts_format_gives_the_released_numbers(
    golden_folder, checkpoint_folder
):
    expected = load_file(golden_folder / "lora.safetensors")
    model = PeftModel.from_pretrained(load(checkpoint_folder), golden_folder / "lora_adapter")
    logits = model.eval()(expected["single.input_ids"]).logits
    assert distance(logits, expected["single.logits"]) < 1e-4
    output = greedy(model, input_ids=expected["greedy.input_ids"])
    assert torch.equal(output, expected["greedy.output_ids"])
    merged = model.merge_and_unload()
    assert distance(merged(expected["single.input_ids"]).logits, logits) < 1e-4


# Two roads to one number


@torch.no_grad()
def test_a_row_has_the_same_logits_alone_and_in_any_batch(released, golden):
    ids = golden["left.input_ids"]
    real = ids != PAD
    alone = [released(row[keep][None]).logits[0] for row, keep in zip(ids, real, strict=True)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0], [1, 1]):
        logits = released(ids[order], attention_mask=real[order].long()).logits
        for place, row in enumerate(order):
            assert distance(logits[place][real[row]], alone[row]) < 2e-5


@torch.no_grad()
def test_a_row_has_the_same_logits_with_more_pads(released, golden):
    ids = golden["single.input_ids"]
    padded = torch.nn.functional.pad(ids, (9, 0), value=PAD)
    logits = released(padded, attention_mask=(padded != PAD).long()).logits
    assert distance(logits[:, 9:], released(ids).logits) < 2e-5


@torch.no_grad()
def test_an_answer_read_in_chunks_gives_the_logits_of_one_pass(released, golden):
    ids = golden["single.input_ids"]
    whole = released(ids).logits
    context_lengths, mask_positions = context_of(released, ids)
    cut = int(context_lengths) + 2
    first = released(ids[:, :cut], use_cache=True)
    rest = released(
        ids[:, cut:],
        past_key_values=first.past_key_values,
        context_lengths=context_lengths,
        mask_positions=mask_positions,
        position_ids=torch.arange(cut, ids.shape[1])[None],
    )
    assert distance(torch.cat((first.logits, rest.logits), dim=1), whole) < 2e-5


@torch.no_grad()
def test_logits_to_keep_gives_the_last_ones(released, golden):
    ids = golden["single.input_ids"]
    assert distance(released(ids, logits_to_keep=2).logits, released(ids).logits[:, -2:]) < 1e-5


@torch.no_grad()
def test_embeddings_given_in_place_of_ids_give_the_same_logits(released, golden):
    ids = golden["single.input_ids"]
    context_lengths, mask_positions = context_of(released, ids)
    logits = released(
        inputs_embeds=released.get_input_embeddings()(ids),
        context_lengths=context_lengths,
        mask_positions=mask_positions,
    ).logits
    assert distance(logits, released(ids).logits) < 1e-5


def test_gradient_checkpointing_gives_the_same_gradients(checkpoint_folder, golden):
    gradients = []
    for checkpointing in (False, True):
        model = load(checkpoint_folder).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(golden["train.input_ids"], labels=golden["train.labels"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert relative(gradients[1][name], gradient) < 1e-5, name


# Narrow numbers


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 0.05), (torch.bfloat16, 0.3)])
def test_narrow_types_come_close_to_fp32(released, checkpoint_folder, golden, dtype, most):
    model = load(checkpoint_folder, dtype)
    ids = golden["left.input_ids"]
    real = ids != PAD
    logits = model(ids, attention_mask=real.long()).logits
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()
    assert distance(logits[real], golden["left.logits"][real]) < most


@torch.no_grad()
@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_run_in_fp16(golden_folder, quantized_folders, bits):
    expected = load_file(golden_folder / f"int{bits}.safetensors")
    logits = load(quantized_folders[bits], torch.float16)(expected["single.input_ids"]).logits
    assert torch.isfinite(logits).all()
    assert distance(logits, expected["single.logits"]) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_scores_past_the_range_of_fp16_do_no_harm(write_checkpoint, golden, cached):
    layer = 26
    name = f"transformer.layers.{layer}.attention.query_key_value"

    def enlarge(state):
        for kind in ("weight", "bias"):
            rows = state[f"{name}.{kind}"].clone().unflatten(0, (4, 3, 16))
            rows[:, :2] *= 48  # q and k of every head
            state[f"{name}.{kind}"] = rows.flatten(0, 2)

    folder = write_checkpoint(enlarge)
    wide, narrow = load(folder), load(folder, torch.float16)
    ids = golden["single.input_ids"]
    seen = []
    block = wide.transformer.layers[layer].attention.query_key_value
    hook = block.register_forward_hook(lambda module, given, output: seen.append(output))
    expected = wide(ids).logits
    hook.remove()
    q, k, _ = seen[0].unflatten(-1, (4, -1)).transpose(1, 2).chunk(3, dim=-1)
    assert (q @ k.transpose(2, 3)).abs().max() > 65504
    logits = narrow(ids, use_cache=cached).logits
    assert torch.isfinite(logits).all()
    # By norm: at scores this large single rows may swap two nearly equal keys.
    assert (logits.float() - expected).norm() / expected.norm() < 0.05


# Generation


def test_sampling_with_a_seed_gives_the_same_tokens_again(released, golden):
    def sample(seed):
        torch.manual_seed(seed)
        return released.generate(
            golden["greedy.input_ids"], max_new_tokens=12, do_sample=True, temperature=2.0,
            top_p=0.95, eos_token_id=319,
        )  # fmt: skip

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_generate_without_input_ids_is_refused(released):
    with pytest.raises(ToolkitError, match="input_ids"):
        released.generate(max_new_tokens=2)


def test_a_sequence_past_the_longest_is_refused(released):
    ids = torch.full((1, 257), 7)
    with pytest.raises(ToolkitError, match=r"257 tokens.*256"):
        released(ids)


@torch.no_grad()
def test_a_sequence_of_the_greatest_length_is_read(released):
    ids = torch.full((1, 256), 7)
    ids[:, -2:] = torch.tensor([301, 304])
    assert torch.isfinite(released(ids, logits_to_keep=1).logits).all()


def test_generation_past_the_longest_is_refused(released):
    ids = torch.full((1, 254), 7)
    ids[:, -2:] = torch.tensor([301, 304])
    with pytest.raises(ToolkitError, match="max_sequence_length"):
        released.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=319)


def test_continuing_from_a_cache_without_positions_is_refused(released, golden):
    cache = released(golden["cache.input_ids"], use_cache=True).past_key_values
    with pytest.raises(ToolkitError, match="position_ids"):
        released(torch.tensor([[33]]), past_key_values=cache)


# Files


def test_saved_weights_come_back_equal(released, golden, tmp_path):
    released.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    again = load(tmp_path)
    for name, tensor in released.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    output = greedy(again, golden["greedy.input_ids"])
    assert torch.equal(output, golden["greedy.output_ids"])


@pytest.mark.parametrize("bits", [8, 4])
def test_saved_quantised_weights_come_back_equal(quantized_folders, tmp_path, bits):
    model = load(quantized_folders[bits], torch.float16)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, torch.float16)
    assert again.config.quantization_bit == bits
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert again.state_dict()[name].dtype == tensor.dtype, name


def test_stored_packed_weights_stay_int8_with_their_fp16_scales(quantized_folders):
    for folder in quantized_folders.values():
        attention = load(folder, torch.float16).transformer.layers[3].attention
        assert attention.query_key_value.weight.dtype == torch.int8
        assert attention.query_key_value.weight_scale.dtype == torch.float16


def test_the_gradient_of_virtual_tokens_keeps_no_other_memory():
    virtual, found = torch.ones(2, 3, requires_grad=True), []
    scaled = 2 * virtual
    scaled.register_hook(lambda g: found.append((g.untyped_storage().nbytes(), g.nbytes)))
    torch.cat((own_gradient(scaled), torch.ones(1000, 3))).pow(2).sum().backward()
    assert found == [(24, 24)]
    assert torch.equal(virtual.grad, torch.full((2, 3), 8.0))


def test_a_saved_prefix_comes_back_equal(checkpoint_folder, tmp_path):
    model = load(checkpoint_folder, pre_seq_len=6, prefix_projection=True)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.pre_seq_len == 6
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM])
def test_auto_classes_load_it(auto, checkpoint_folder):
    assert isinstance(AutoConfig.from_pretrained(checkpoint_folder), ChatGLMConfig)
    assert isinstance(auto.from_pretrained(checkpoint_folder), ChatGLMForConditionalGeneration)


@pytest.mark.parametrize("trust", [False, True])
def test_code_in_a_folder_is_never_run(write_checkpoint, trust):
    folder = write_checkpoint()
    marker = folder / "marker"
    for name in ("configuration_chatglm", "modeling_chatglm"):
        code = f"open({str(marker)!r}, 'w').close()\nfrom chatglm.model import *\n"
        (folder / f"{name}.py").write_text(code)
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        model = auto.from_pretrained(folder, trust_remote_code=trust)
        assert isinstance(model, ChatGLMForConditionalGeneration)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    assert isinstance(config, ChatGLMConfig)
    ChatGLMForConditionalGeneration.from_pretrained(folder, trust_remote_code=trust)
    assert not marker.exists()


NORM = "transformer.layers.5.input_layernorm.weight"


@pytest.mark.parametrize(
    ("kind", "named", "change"),
    [
        ("missing", NORM, lambda state: state.pop(NORM)),
        ("missing", "lm_head.weight", lambda state: state.pop("lm_head.weight")),
        ("surplus", "lm_head.bias", lambda state: state.update({"lm_head.bias": torch.ones(320)})),
        ("misshapen", NORM, lambda state: state.update({NORM: torch.ones(63)})),
        ("surplus", "transformer.prefix_encoder.embedding.weight",
         lambda state: state.update(
             {"transformer.prefix_encoder.embedding.weight": torch.ones(6, 3584)})),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(write_checkpoint, kind, named, change):
    with pytest.raises(ToolkitError) as caught:
        load(write_checkpoint(change))
    assert kind in str(caught.value)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_quantised_checkpoint_without_quantization_bit_is_refused(quantized_folders, tmp_path):
    (tmp_path / "pytorch_model.bin").symlink_to(quantized_folders[4] / "pytorch_model.bin")
    write_config(tmp_path)
    with pytest.raises(ToolkitError, match="quantization_bit"):
        load(tmp_path)


def test_auto_classes_refuse_tensors_that_do_not_fit(write_checkpoint):
    folder = write_checkpoint(lambda state: state.pop(NORM))
    with pytest.raises(ToolkitError, match=NORM):
        AutoModel.from_pretrained(folder)


def test_the_first_release_is_recognised(write_checkpoint):
    with pytest.raises(ToolkitError, match="150528"):
        load(write_checkpoint(vocab_size=150528))


def test_stored_rotary_frequencies_are_ignored(write_checkpoint, released_state, golden):
    keys = [name for name in released_state if name.endswith("rotary_emb.inv_freq")]
    assert keys

    def spoil(state):
        state.update({name: torch.full_like(state[name], 7.0) for name in keys})

    model = load(write_checkpoint(spoil))
    assert not [name for name in model.state_dict() if "inv_freq" in name]
    with torch.no_grad():
        logits = model(golden["single.input_ids"]).logits
    assert distance(logits, golden["single.logits"]) < 1e-4


def test_a_checkpoint_without_rotary_frequencies_loads(write_checkpoint):
    def drop(state):
        for name in [name for name in state if name.endswith("inv_freq")]:
            del state[name]

    load(write_checkpoint(drop))


def test_embedding_and_head_are_stored_apart(checkpoint_folder, released):
    assert json.loads((checkpoint_folder / "config.json").read_text())["vocab_size"] == 320
    embedding, head = released.get_input_embeddings().weight, released.lm_head.weight
    assert embedding.data_ptr() != head.data_ptr()
