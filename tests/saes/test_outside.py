"""A variant from outside of the package: one class and one config, which no file of the package knows."""

import pytest
import torch

from sae_lightning.saes import SAE, VARIANTS
from sae_lightning.saes.losses import TERMS
from sae_lightning.saes.sae import ForwardOutput
from sae_lightning.training.fit import train

CONFIG = """# @package _global_
sae: {name: shifted, settings: SETTINGS, threshold: calibrated}
loss: {reconstruction: 1.0, small: 0.1}
"""


def small(sae: SAE, output: ForwardOutput) -> torch.Tensor:
    return output.codes.values.square().mean()


@pytest.fixture
def variant():
    class Shifted(SAE):
        variant = "shifted"
        losses = {"small": small}  # noqa: RUF012

        def __init__(self, d_in, d_sae, shift, **options):
            super().__init__(d_in, d_sae, **options)
            self.shift, self.started, self.finished = shift, 0, ""

        def settings(self):
            return {"shift": self.shift} | super().settings()

        def code(self, x):
            return self.positive(x, self.b_enc - self.shift)

        def start(self, x, l0):
            self.started += 1

        def finish(self, batches, n_samples, how):
            self.finished = f"{how} on {n_samples == sum(map(len, batches))}"
            print(self.finished, self.started > 1)

        def logged(self):
            return {"shift": torch.tensor(self.shift)}

    yield Shifted
    del VARIANTS["shifted"], TERMS["small"]


@pytest.fixture
def own(config, tmp_path):
    """``own(settings, *overrides)``: a config of the variant, from a folder of its own."""

    def make(settings, *overrides):
        (tmp_path / "own" / "sae").mkdir(parents=True)
        (tmp_path / "own" / "sae" / "shifted.yaml").write_text(CONFIG.replace("SETTINGS", settings))
        return config(f"hydra.searchpath=[file://{tmp_path / 'own'}]", "sae=shifted", *overrides)

    return make


def test_a_variant_of_another_package_trains_and_loads(variant, own, config, capsys):
    folder = train(own("{shift: 0.25}", "trainer.max_epochs=1"))
    assert "calibrated on True True" in capsys.readouterr().out
    sae = SAE.load(folder)
    assert (type(sae), sae.settings()) == (variant, {"shift": 0.25})
    history = (folder / "history.csv").read_text().splitlines()
    assert {"loss/small", "train/shift"} <= set(history[0].split(","))
    with pytest.raises(ValueError, match=r"sae\.name=relu has no loss term small; set .*, or choose shifted"):
        train(config("sae=relu", "+loss.small=1"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [("{shift: 1, width: 1}", "unexpected keyword argument 'width'"), ("{}", "missing 1 required .*'shift'")],
)
def test_its_class_checks_its_settings_before_any_work(variant, settings, sentence, own):
    with pytest.raises(ValueError, match=rf"sae\.settings=.* do not fit sae\.name=shifted: .*{sentence}"):
        train(own(settings, "paths.stores=/nowhere"))


def test_a_variant_s_name_is_taken_once():
    with pytest.raises(ValueError, match=r"sae\.name=topk is taken by sae_lightning\.saes\.topk\.TopK; choose another"):
        type("Other", (SAE,), {"variant": "topk"})
