"""What a page says first, and means over latents."""

import pytest
import torch

from sae_lightning.files import write_tensors
from sae_lightning.report.page import build
from sae_lightning.report.result import judges, latents_table, leaders, least_of, of_latents, span
from sae_lightning.runs.run import LATENTS
from tests.report.test_visaebench import sae, shown, write_run  # noqa: F401

NAN = float("nan")


def run_with(folder, fired, purity, n_images=1000, **other):
    folder.mkdir()
    tensors = {"images_fired": torch.tensor(fired), "purity": torch.tensor(purity, dtype=torch.float64)}
    write_tensors(folder / LATENTS, tensors, {})
    return {"folder": folder, "n_images": n_images, "label": folder.name, "colour": "#123456",
            "cfg": {"d_sae": len(fired)}, **other}  # fmt: skip


def test_means_over_latents_are_also_of_those_on_enough_pictures(tmp_path):
    run = run_with(tmp_path / "run", [0, 1, 9, 10, 300], [0.0, 1.0, 1.0, 0.5, 0.1])
    found = of_latents(run)
    assert (found.least, found.fire, found.frequent) == (10, 4, 2)
    assert found.means["purity"] == pytest.approx((0.65, 0.3))
    over_all, frequent = latents_table([run]).texts()
    assert over_all[1:6] == ["latents that fire", "4", "80 %", "–", "0.650"]
    assert frequent[1:6] == ["of latents on ≥ 10 pictures", "2", "40 %", "–", "0.300"]
    write_tensors(run["folder"] / LATENTS, {"purity": torch.ones(3)}, {})
    assert latents_table([run]) is None  # an evaluation that does not say on what they fire


@pytest.mark.parametrize(("images", "least"), [(50, 10), (1000, 10), (2000, 20), (50001, 501)])
def test_enough_is_one_picture_in_a_hundred_and_at_least_ten(images, least):
    assert least_of(images) == least


def test_a_range_is_one_number_where_both_ends_read_the_same():
    assert span([0.714, 0.712, NAN], ".0%") == "71 %"
    assert span([3.0, 12.0], ".0f") == "3 to 12"
    assert span([NAN], ".0f") == "–"


def test_monoscores_are_shown_above_the_baselines_of_their_judges():
    def run(judge, score, baseline):
        return {"similarity": {"title": judge, "baseline": baseline}, "metrics": {"monoscore_scored": score}}

    assert (
        judges([run("a", 0.5, 0.4), run("a", 0.6, 0.4)]) == "MonoScores less those of random pictures: +0.10 to +0.20."
    )
    several = judges([run("a", 0.9, 0.85), run("b", 0.3, 0.1)])
    assert several == "MonoScores less those of random pictures: +0.05 to +0.20; their 2 judges have different scales."


def test_no_backbone_is_first_by_what_each_judges_differently():
    def of(backbone, value):
        return sae(backbone, [value] * 7)

    assert leaders([of("clip", 0.3), of("clip", 0.5)]) == ""  # of one backbone
    assert leaders([of("clip", 0.3), of("clip", 0.5), of("mae", 0.6)]) == (
        "First by the mean of its SAEs: mae L4 M1 (0.600), M3 (0.600), M4 (0.600), M6 (0.600); clip L4 M2 (0.400), "
        "M7 (0.400). M5 is judged on each backbone's own scale."
    )


def test_a_page_of_the_benchmark_has_its_name_and_measures_first(tmp_path, shown):  # noqa: F811
    runs = [write_run(tmp_path / "runs" / f"{b}-x8", f"{b} (tiny)") for b in ("clip", "mae")]
    page = build(runs, tmp_path / "page.html", detailed=0).read_text()
    assert "<h1>ViSAEBench of 2 sparse autoencoders</h1>" in page
    assert page.index('<section id="visaebench">') < page.index('<section id="runs">')
