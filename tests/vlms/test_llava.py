"""A LLaVA with random weights through the whole interface: what holds of any vision-language model."""

import pytest
import torch
from PIL import Image

from sae_lightning.vlms import VLM, VLMError, load_vlm
from tests.vlms.configs import noise, vlm
from tests.vlms.ties import assert_same_captions


@pytest.fixture(scope="module")
def llava() -> VLM:
    return load_vlm(vlm("llava_random", max_new_tokens=6))


def tower_states(model: VLM, images: list[Image.Image]) -> tuple[torch.Tensor, ...]:
    pixels = model.processor(text=["<image>"] * len(images), images=images, return_tensors="pt").pixel_values
    with torch.no_grad():
        return model.vision_tower(pixels, output_hidden_states=True).hidden_states


def test_anatomy_is_that_of_the_architecture(llava):
    assert type(llava.vision_tower).__name__ == "CLIPVisionModel"
    assert llava.depth == 4
    assert llava.feature_layer == 2  # hidden states -2 of 5 are the output of block 2
    assert llava.special_tokens == 1
    assert llava.grid == (4, 4)
    assert llava.device == torch.device("cpu")
    assert llava.layer(-1) is llava.layer(3)


def test_batches_say_what_single_pictures_say(llava):
    images = noise(5)
    together = llava.captions(images, batch_size=5)
    assert_same_captions(llava, images, together, [llava.captions([image])[0] for image in images])
    assert_same_captions(llava, images, together, llava.captions(images, batch_size=2))
    assert len(set(together)) > 1
    assert all(0 < len(text.split()) <= 6 for text in together)


def test_captions_are_greedy_and_do_not_repeat_the_prompt(llava):
    image = noise(1)[0]
    inputs = llava.processor(text=["<image> a photo of"], images=[image], return_tensors="pt")
    ids, said = inputs["input_ids"], []
    with torch.no_grad():
        for _ in range(6):  # no cache, no generate
            logits = llava.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
            said.append(int(logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[said[-1]]])], dim=1)
    expected = llava.processor.tokenizer.decode(said, skip_special_tokens=True)
    assert llava.captions([image], max_new_tokens=6) == [expected]


def test_a_prompt_without_a_picture_gets_one(llava):
    image = noise(1)
    assert llava.captions(image, "a photo of") == llava.captions(image, "<image>\na photo of")
    assert llava.captions(image, "dark") != llava.captions(image, "a photo of")


def test_a_prompt_without_a_picture_is_put_into_the_chat_template(llava, monkeypatch):
    template = "{% for turn in messages %}dog {% for part in turn.content %}"
    template += "{{ '<image>' if part.type == 'image' else ' ' + part.text }}{% endfor %} on{% endfor %}"
    images = noise(2)
    expected = llava.captions(images, "dog <image> red bird on")
    monkeypatch.setattr(llava.processor, "chat_template", template)
    assert llava.captions(images, "red bird") == expected
    assert llava.captions(images, "<image> red bird") != expected  # complete as it is


def test_patch_tokens_are_the_hidden_states_behind_a_block(llava):
    images = noise(5)
    states = tower_states(llava, images)
    for layer in range(llava.depth):
        torch.testing.assert_close(llava.patch_tokens(images, layer, batch_size=2), states[layer + 1][:, 1:])


@pytest.mark.parametrize("layer", [0, 2])
def test_an_edit_reaches_the_language_model(llava, layer):
    images = noise(3)
    before = llava.captions(images)
    with llava.editing(layer, lambda tokens: torch.full_like(tokens, 2.0)):
        assert len(set(llava.captions(images))) == 1  # the picture is gone
    assert llava.captions(images) == before
    with llava.editing(layer, lambda tokens: tokens.clone().double()):
        assert llava.captions(images) == before  # an edit that changes nothing, whatever its dtype


def test_an_edit_behind_the_feature_layer_changes_nothing(llava):
    images = noise(3)
    with llava.editing(llava.feature_layer + 1, torch.zeros_like):
        assert llava.captions(images) == llava.captions(images)
        inside = llava.captions(images)
    assert inside == llava.captions(images)


def test_an_edit_ends_with_its_block_even_when_it_fails(llava):
    images = noise(2)
    before = llava.captions(images)
    with pytest.raises(VLMError, match="keep the shape"), llava.editing(1, lambda tokens: tokens[:, 1:]):
        llava.captions(images)
    assert llava.captions(images) == before


def test_random_weights_are_the_same_each_time_and_leave_the_generators_alone(llava):
    state = torch.random.get_rng_state()
    again = load_vlm(vlm("llava_random", max_new_tokens=6))
    assert torch.equal(state, torch.random.get_rng_state())
    assert again.captions(noise(2)) == llava.captions(noise(2))


def test_several_feature_layers_count_by_the_latest():
    changed = vlm("llava_random", architecture={"vision_feature_layer": [-4, 1, -3]})
    model = load_vlm(changed)
    assert model.feature_layer == 1  # hidden states 1, 1 and 2 of 5
    assert model.captions(noise(1))[0]


@pytest.mark.parametrize(
    ("kind", "special"), [("siglip_vision_model", 0), ("vit", 1), ("dinov2", 1), ("dinov2_with_registers", 5)]
)
def test_towers_of_other_kinds(kind, special):
    strategy = "full" if special == 0 else "default"
    model = load_vlm(
        vlm(
            "llava_random",
            architecture={
                "vision_config": {"model_type": kind},
                "vision_feature_select_strategy": strategy,
            },
        )
    )
    assert model.depth == 4
    assert model.special_tokens == special
    assert model.patch_tokens(noise(2), 1).shape == (2, 16, 64)


def test_a_path_to_the_blocks_and_the_tower():
    model = load_vlm(vlm("llava_random", tower="model.vision_tower", blocks="encoder.layers"))
    assert model.layer(1) is model.model.model.vision_tower.encoder.layers[1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"blocks": "encoder.stages"}, r"vlm.blocks=encoder.stages does not exist: CLIPEncoder has no 'stages'"),
        ({"tower": "model.eyes"}, r"vlm.tower=model.eyes does not exist: LlavaModel has no 'eyes'"),
        ({"architecture": {"model_type": "blip-2"}}, "random weights are made for llava only"),
        ({"architecture": {"text_config": {"num_attention_heads": 5}}}, "transformers cannot build vlm.architecture"),
    ],
)
def test_configs_that_do_not_fit(changes, sentence):
    with pytest.raises(VLMError, match=sentence):
        load_vlm(vlm("llava_random", **changes))


def test_layers_and_pictures_that_do_not_exist(llava):
    with pytest.raises(VLMError, match=r"Layer 4 does not exist in the vision tower of LLaVA .*: it has 0 to 3\."):
        llava.layer(4)
    with pytest.raises(VLMError, match="put the picture into a list"):
        llava.captions(noise(1)[0])
    with pytest.raises(VLMError, match="There are no pictures"):
        llava.patch_tokens([], 0)
    assert llava.captions([]) == []


def test_missing_weights_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        VLMError, match=r"'llava-hf/llava-1.5-7b-hf' cannot be loaded: .*vlm=tiny works offline\.$"
    ) as error:
        load_vlm(vlm("llava15"))
    assert "\n" not in str(error.value)
    with pytest.raises(VLMError, match="is no folder"):
        load_vlm(vlm("llava15", weights=str(tmp_path / "nowhere")))
    with pytest.raises(VLMError, match=r"vlm\.dtype=int8"):
        load_vlm(vlm("llava15", dtype="int8"))
    with pytest.raises(VLMError, match=r"vlm\.model is missing"):
        load_vlm(vlm("llava15", model=None))
    with pytest.raises(VLMError, match=r"vlm\.prompt is missing"):
        load_vlm(vlm("llava15", prompt=None))
    if not torch.cuda.is_available():
        with pytest.raises(VLMError, match="device=cuda, but this machine has no CUDA device"):
            load_vlm(vlm("llava_random"), "cuda")


def test_a_saved_model_comes_back_and_pickles_do_not(llava, tmp_path):
    llava.model.save_pretrained(tmp_path)
    llava.processor.save_pretrained(tmp_path)
    node = vlm("llava15", weights=str(tmp_path), dtype="float32", prompt=llava.prompt, max_new_tokens=6)
    assert load_vlm(node).captions(noise(3)) == llava.captions(noise(3))
    (tmp_path / "model.safetensors").unlink()
    torch.save(llava.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(VLMError, match="cannot be loaded"):
        load_vlm(node)


def test_weights_that_lack_tensors_are_refused(llava, tmp_path):
    llava.model.save_pretrained(tmp_path, state_dict={
        name: tensor for name, tensor in llava.model.state_dict().items() if "projector" not in name
    })  # fmt: skip
    llava.processor.save_pretrained(tmp_path)
    with pytest.raises(VLMError, match=r"lack 4 tensors of LlavaForConditionalGeneration, '.*projector"):
        load_vlm(vlm("llava15", weights=str(tmp_path), dtype="float32"))
