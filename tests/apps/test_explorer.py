"""The explorer's server: every answer, what it refuses, and the page in a browser."""

import io
import json
import re
import shutil
import subprocess
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.testclient import TestClient

from sae_lightning.apps.explorer.app import application, listen, run, server_of
from sae_lightning.apps.explorer.run_view import OpenRuns, PictureRef, RunView
from sae_lightning.apps.explorer.server import Explorer, make_app, page
from sae_lightning.apps.explorer.uploads import Uploads
from sae_lightning.apps.explorer.views import Captioner
from sae_lightning.features.source import Source
from sae_lightning.rendering.pictures import SILENT
from sae_lightning.runs.run import Run
from sae_lightning.saes import Normalizer, TopK
from sae_lightning.training.fit import record
from tests.configs import composed
from tests.processes import HANG
from tests.scoring import evaluate_run

SITE = "http://127.0.0.1:8000"


def made_run(folder, cfg: DictConfig) -> Run:
    """A finished run with a random dictionary on the pictures."""
    store = Source.of(cfg).store("train")
    sae = TopK(store.d_in, 2 * store.d_in, k=4, normalizer=Normalizer(store.d_in, store.mean, store.std), seed=0)
    sae.save(folder, **record(cfg, folder, {"train": store}))
    (folder / "result.json").write_text("{}")
    return Run(folder)


@pytest.fixture(scope="module")
def runs(pictures, tmp_path_factory) -> list[Run]:
    """One run on patch tokens and one on pooled features of the same pictures."""
    root = tmp_path_factory.mktemp("explorer")

    def config(features: str) -> DictConfig:
        return composed(
            "config", "data=folder", f"data.path={pictures}", "backbone=deit", "backbone.size=tiny", "sae=topk", "k=4",
            "expansion=2", f"features={features}", f"paths.stores={root / 'stores'}",
        )  # fmt: skip

    found = []
    for kind in ("patch", "pooled"):
        (root / kind).mkdir()
        found.append(made_run(root / kind, config(kind)))
    return found


@pytest.fixture(scope="module")
def open_runs(runs) -> OpenRuns:
    return OpenRuns(runs, "train")


class Seer:
    """A captioner that says what the tokens of picture 0 sum up to."""

    title, feature_layer, special_tokens, batch_size = "seer", 9, 0, 4

    def __init__(self, store) -> None:
        self.store, self.block, self.edits = store, torch.nn.Linear(1, 1), []

    def layer(self, index: int) -> torch.nn.Module:
        return self.block

    @contextmanager
    def editing(self, layer, edit):
        self.edits.append(edit)
        yield
        self.edits.pop()

    def patch_tokens(self, images, layer):
        return self.store.features(list(range(len(images)))).float()

    def captions(self, images, batch_size=None):
        tokens = self.store.features([0]).float()
        for edit in self.edits:
            tokens = edit(tokens)
        return [f"sum {float(tokens.sum()):.3f}"] * len(images)


@pytest.fixture(scope="module")
def client(open_runs) -> TestClient:
    captioner = Captioner({}, load=lambda *node: Seer(open_runs[0].store))
    app = make_app(Explorer(open_runs, captioner, per_band=3, n_latents=5, n_near=4, upload_bytes=100_000))
    return TestClient(app, base_url=SITE, raise_server_exceptions=False)


def picture_bytes(open_runs: OpenRuns, number: int) -> bytes:
    buffer = io.BytesIO()
    open_runs[0].picture(PictureRef("images", number)).save(buffer, "PNG")
    return buffer.getvalue()


def upload(client: TestClient, data: bytes, **headers) -> int:
    return client.post("/api/uploads", content=data, headers=headers).json()["upload"]


def test_the_page_is_one_file_that_may_run_only_itself(client):
    answer = client.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert (answer.text, policy) == page()
    outside = r"""(?:src|href)=["'](?!data:)|url\(|@import|https?://(?!www\.w3\.org/2000/svg)"""
    assert not re.findall(outside, answer.text)
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_runs_are_listed_and_described(client, runs):
    assert [run["name"] for run in client.get("/api/runs").json()] == ["patch", "pooled"]
    patch, pooled = client.get("/api/runs/0").json(), client.get("/api/runs/1").json()
    assert patch["patches"] == [8, 8]
    assert pooled["patches"] is None
    assert patch["classes"] == ["columns", "rows"]
    assert patch["n_images"] == 32
    assert not patch["evaluated"]
    assert [c["name"] for c in patch["columns"]][:2] == ["monoscore", "purity"]
    assert (patch["sort"], patch["least"]) == ("purity", 1)  # what is listed first, on one picture in a hundred


def test_the_list_is_sorted_and_paged(client, open_runs):
    view = open_runs[0]
    firing = np.flatnonzero(view.figures.images_fired >= 2)
    values = view.figures.columns["purity"].values
    wanted = sorted(firing.tolist(), key=lambda i: (values[i], i))
    query = {"sort": "purity", "order": "asc", "least": 2}
    pages = [client.get("/api/runs/0/latents", params=query | {"start": s, "count": 7}).json() for s in range(0, 21, 7)]
    assert [row["latent"] for page in pages for row in page["rows"]] == wanted[:21]
    assert pages[0]["total"] == len(wanted)
    by_number = {"sort": "latent", "order": "asc", "label": 1, "count": 200}
    of_class = client.get("/api/runs/0/latents", params=by_number).json()
    assert [row["latent"] for row in of_class["rows"]] == np.flatnonzero(view.figures.label == 1).tolist()[:200]
    named = client.get("/api/runs/0/latents", params={"text": "rows", "least": 1}).json()
    assert named["total"] > 0
    assert named["total"] == sum("rows" in n for n, f in zip(view.names, view.figures.images_fired, strict=True) if f)


def test_a_latent_shows_bands_histogram_classes_and_neighbours(client, open_runs):
    view = open_runs[0]
    latent = int(view.figures.images_fired.argmax())
    found = client.get(f"/api/runs/0/latents/{latent}").json()
    assert [band["name"] for band in found["bands"]] == ["top", "middle", "bottom"]
    shown = [item["image"] for band in found["bands"] for item in band["images"]]
    assert len(set(shown)) == 9
    column = view.codes[:, [latent]].toarray()[:, 0]
    for band in found["bands"]:
        assert [item["value"] for item in band["images"]] == pytest.approx(
            [column[i["image"]] for i in band["images"]], rel=1e-4
        )
    assert shown[0] == int(column.argmax())
    assert sum(found["histogram"]) == found["images_fired"] == (column > 0).sum()
    assert sum(c["share"] for c in found["classes"]) == pytest.approx(1, abs=1e-5)
    directions = view.opened.sae.W_dec.detach()
    cosines = torch.nn.functional.cosine_similarity(directions, directions[latent : latent + 1])
    cosines[latent], cosines[torch.from_numpy(view.figures.images_fired == 0)] = -2, -2
    assert found["similar"][0]["latent"] == int(cosines.argmax())


def test_a_picture_shows_its_strongest_latents_and_the_one_asked_for(client, open_runs):
    row = open_runs[0].codes[3].toarray()[0]
    silent = int(np.flatnonzero(row == 0)[0])
    found = client.get(f"/api/runs/0/images/3?latent={silent}").json()
    assert [item["latent"] for item in found["latents"]] == [*np.argsort(-row, kind="stable")[:5].tolist(), silent]
    assert found["latents"][-1]["value"] == 0
    assert found["active"] == (row > 0).sum()
    assert found["label"] in ("rows", "columns")


def test_pictures_come_as_webp_plain_and_lit(client, open_runs):
    latent = int(open_runs[0].pooled(PictureRef("images", 0))[0][0])
    plain, lit = client.get("/api/runs/0/images/0/picture"), client.get(f"/api/runs/0/images/0/over/{latent}")
    for answer in (plain, lit):
        assert answer.headers["content-type"] == "image/webp"
        assert "max-age" in answer.headers["cache-control"]
    tint = client.get(f"/api/runs/0/images/0/over/{latent}?heat=1")

    def patches(answer):
        shown = Image.open(io.BytesIO(answer.content)).convert("RGB").resize((96, 96), Image.Resampling.NEAREST)
        return np.asarray(shown, dtype=float).reshape(8, 12, 8, 12, 3)[:, 3:9, :, 3:9].mean((1, 3))

    fires = open_runs[0].activation(PictureRef("images", 0), latent) > 0
    assert 0 < fires.sum() < 64
    assert np.abs(patches(lit) - patches(plain))[fires].mean() < 12  # their own colours
    assert np.abs(patches(lit) - SILENT * patches(plain))[~fires].mean() < 12
    assert np.abs(patches(tint) - patches(lit))[~fires].mean() < 8
    assert np.abs(patches(tint) - patches(lit))[fires].mean() > 30
    assert client.get(f"/api/runs/0/images/0/over/{latent}?heat=2").status_code == 400
    assert client.get("/api/runs/1/images/0/over/0").status_code == 409  # no patches


def test_an_upload_has_the_latents_of_the_same_stored_picture(client, open_runs):
    for run_number in (0, 1):
        number = upload(client, picture_bytes(open_runs, 5), **{"content-type": "image/png", "origin": SITE})
        stored = client.get(f"/api/runs/{run_number}/images/5").json()["latents"]
        given = client.get(f"/api/runs/{run_number}/uploads/{number}").json()["latents"]
        assert [item["latent"] for item in given] == [item["latent"] for item in stored]
        assert [item["value"] for item in given] == pytest.approx([item["value"] for item in stored], rel=1e-2)
    latent = given[0]["latent"]
    picture = client.get(f"/api/runs/0/uploads/{number}/picture")
    assert (picture.status_code, picture.headers["cache-control"]) == (200, "no-store")
    assert client.get(f"/api/runs/0/uploads/{number}/over/{latent}").status_code == 200
    large = io.BytesIO()
    Image.new("RGB", (900, 700)).save(large, "PNG")
    own = client.get(f"/api/runs/1/uploads/{upload(client, large.getvalue())}/picture?size=1024")
    assert Image.open(io.BytesIO(own.content)).size == (700, 700)  # at its own resolution
    near = client.post(f"/api/runs/0/uploads/{number}/turn", json={"latent": latent, "value": 2.0}).json()
    assert near["before"][0]["image"] == 5  # the same picture is nearest


def test_turning_a_latent_moves_the_neighbours_along_its_decoder_row(client, open_runs):
    view = open_runs[0]
    latent = int(view.figures.images_fired.argmax())
    found = client.post("/api/runs/0/images/2/turn", json={"latent": latent, "value": 40.0}).json()
    features = view.store.features(slice(0, len(view.store))).float()
    sae = view.opened.sae
    codes = sae.encode(features[2]).to_dense()
    moved = features[2] + (40.0 - codes[:, [latent]]) * sae.W_dec[latent].detach() * sae.normalizer.std
    for name, query in (("before", features[2].mean(0)), ("after", moved.mean(0))):
        cosines = torch.nn.functional.cosine_similarity(features.mean(1), query[None])
        cosines[2] = -2
        best = cosines.argsort(descending=True)[:4]
        assert [item["image"] for item in found[name]] == best.tolist()
        assert [item["cosine"] for item in found[name]] == pytest.approx(cosines[best].tolist(), abs=1e-4)
    assert [i["image"] for i in found["before"]] != [i["image"] for i in found["after"]]


def test_a_caption_changes_where_the_model_fits_the_run(client, open_runs):
    assert client.get("/api/runs/0/captions").json() == {"why_not": ""}
    said = client.post("/api/runs/0/images/0/caption", json={"latent": 1, "value": 30.0}).json()
    sae, features = open_runs[0].opened.sae, open_runs[0].store.features([0]).float()
    with torch.no_grad():
        change = (30.0 - sae.encode(features[0]).to_dense()[:, 1]).sum() * sae.W_dec[1].sum() * sae.normalizer.std
    before, after = (float(said[name].split()[1]) for name in ("before", "after"))
    assert before == pytest.approx(float(features.sum()), abs=1e-2)
    assert after - before == pytest.approx(float(change), rel=1e-3)
    assert "patch tokens" in client.get("/api/runs/1/captions").json()["why_not"]
    refused = client.post("/api/runs/1/images/0/caption", json={"latent": 1, "value": 3})
    assert refused.status_code == 409


def test_a_model_of_another_encoder_gives_no_captions(open_runs):
    class Other(Seer):
        def patch_tokens(self, images, layer):
            return torch.randn(len(images), 64, self.store.d_in, generator=torch.Generator().manual_seed(0))

    other = Captioner({}, load=lambda *node: Other(open_runs[0].store))
    assert "train on the tower's own encoder" in other.why_not(open_runs[0])
    assert "No vision-language model" in Captioner(None).why_not(open_runs[0])


def test_an_evaluated_run_shows_what_was_measured(runs, tmp_path):
    shutil.copytree(runs[0].folder, tmp_path / "run")
    evaluate_run(tmp_path / "run", split="train")
    view = RunView(Run(tmp_path / "run"), "train", Uploads())
    plain = RunView(runs[0], "train", Uploads())
    assert view.figures.evaluated
    assert "token_share" in view.figures.columns
    codes = view.opened.sae.encode(view.store.features(slice(0, 32)).float()).to_dense()
    np.testing.assert_allclose(
        view.figures.columns["token_share"].values, (codes > 0).float().mean(0).numpy(), rtol=1e-5
    )
    for name in ("monoscore", "purity", "weighted_purity", "peak"):
        np.testing.assert_allclose(
            view.figures.columns[name].values, plain.figures.columns[name].values, rtol=2e-3, atol=1e-5
        )
    assert not RunView(Run(tmp_path / "run"), "test", Uploads()).figures.evaluated


# --- what is refused ------------------------------------------------------------------------------
@pytest.mark.parametrize(("path", "status"), [
    ("/api/runs/2", 404), ("/api/runs/-1", 404), ("/api/runs/99999999999999999999", 404), ("/api/runs/x", 404),
    ("/api/runs/0/latents/100000", 404), ("/api/runs/0/images/32", 404), ("/api/runs/0/images/-1/picture", 404),
    ("/api/runs/0/uploads/77", 404), ("/api/runs/0/uploads/77/picture", 404), ("/api/runs/0/files/1", 404),
    ("/api/runs/0/images/0/over/100000", 404), ("/api/runs/0/images/0/picture?size=97", 400),
    ("/api/runs/0/images/0/picture?size=9999", 400), ("/api/runs/0/latents?sort=__class__", 400),
    ("/api/runs/0/latents?order=up", 400), ("/api/runs/0/latents?start=-1", 400),
    ("/api/runs/0/latents?count=1e9", 400), ("/api/runs/0/latents?count=201", 400),
    ("/api/runs/0/latents?label=2", 400), ("/api/runs/0/images/0?latent=-7", 400), ("/../../etc/passwd", 404),
    ("/%2e%2e/%2e%2e/etc/passwd", 404), ("/etc/passwd", 404), ("//etc/passwd", 404),
    ("/api/runs/0/images/..%2f..%2fetc%2fpasswd/picture", 404), ("/api/runs/..%2f0", 404),
    ("/api/runs/0/images/0%00/picture", 404), ("/static/../page.html", 404), ("/api/uploads", 405),
])  # fmt: skip
def test_what_is_not_there_is_answered_with_a_sentence(client, path, status):
    answer = client.get(path)
    assert answer.status_code == status
    assert answer.json()["error"].endswith((".", "}"))
    assert "root:" not in answer.text


@pytest.mark.parametrize("body", [
    b"", b"[]", b"{}", b'{"latent": 1}', b'{"latent": "1", "value": 1}', b'{"latent": true, "value": 1}',
    b'{"latent": 1, "value": NaN}', b'{"latent": 1, "value": 1e9}', b'{"latent": 1, "value": [1]}', b"\xff",
    b"[" * 4000,
])  # fmt: skip
def test_a_turn_that_makes_no_sense_is_refused(client, body):
    answer = client.post("/api/runs/0/images/0/turn", content=body)
    assert answer.status_code == 400
    assert "latent" in answer.json()["error"]


def test_turns_of_what_is_not_there_and_too_long_ones_are_refused(client):
    for path, body, status in [
        ("/api/runs/0/images/0/turn", {"latent": 10**6, "value": 1}, 404),
        ("/api/runs/0/images/99/turn", {"latent": 1, "value": 1}, 404),
        ("/api/runs/0/images/0/caption", {"latent": -1, "value": 1}, 404),
        ("/api/runs/0/images/0/turn", {"latent": 1, "value": 1, "more": "a" * 5000}, 413),
    ]:
        assert client.post(path, json=body).status_code == status


def test_uploads_that_are_too_large_or_broken_are_refused(client):
    large = client.post("/api/uploads", content=b"\x89PNG" + b"0" * 200_000)
    assert large.status_code == 413
    assert "MB" in large.json()["error"]
    parts = (b"0" * 30_000 for _ in range(100))  # without a declared length
    assert client.post("/api/uploads", content=parts).status_code == 413
    broken = client.post("/api/uploads", content=b"GIF89a-not-really")
    assert broken.status_code == 415
    assert broken.json()["error"].startswith("This is no picture")


def test_the_page_asks_below_its_own_address():
    html = page()[0]
    assert not re.findall(r"""["'`]/api/""", html)
    assert len(re.findall(r"\$\{HOME\}api/", html)) == 3


@pytest.mark.parametrize(
    ("hosts", "host", "origin", "status"),
    [
        ([], "hub.example.org", None, 400),
        (["hub.example.org"], "hub.example.org", "https://hub.example.org", 200),
        (["hub.example.org"], "hub.example.org:8000", "https://hub.example.org", 200),
        (["*.example.org"], "hub.example.org", "https://hub.example.org", 200),
        (["hub.example.org"], "127.0.0.1:8000", "https://hub.example.org", 200),  # the proxy's Host is this machine's
        (["hub.example.org"], "127.0.0.1:8000", "https://evil.example", 403),
        (["hub.example.org"], "hub.example.org", "https://evil.example", 403),
        (["hub.example.org"], "evil.example", "https://hub.example.org", 400),
        (["hub.example.org"], "hub.example.org.evil.example", None, 400),
        (["*"], "any.example", "https://any.example", 200),
        (["*"], "any.example", "https://evil.example", 403),
        (["*"], "127.0.0.1:8000", "https://evil.example", 403),
        ([], "127.0.0.1:8000", "https://127.0.0.1:8000", 403),
        ([], "127.0.0.1:8000", "http://[", 403),
    ],
)
def test_hosts_of_proxies_can_be_allowed(hosts, host, origin, status, open_runs):
    client = TestClient(make_app(Explorer(open_runs, Captioner(None)), hosts), base_url=SITE)
    headers = {"host": host} | ({"origin": origin} if origin else {})
    answer = client.post("/api/uploads", content=picture_bytes(open_runs, 0), headers=headers)
    assert answer.status_code == status
    if status != 200:
        assert "app.hosts" in answer.json()["error"]


def test_other_hosts_and_other_sites_are_refused(client, open_runs):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "0.0.0.0:8000", "192.168.1.2"):
        assert client.get("/api/runs", headers={"host": host}).status_code == 400
        assert client.post("/api/uploads", headers={"host": host, "origin": f"http://{host}"}).status_code == 400
    assert client.get("/api/runs", headers={"host": "localhost:1234"}).status_code == 200
    picture = picture_bytes(open_runs, 0)
    for origin in ("http://evil.example", "http://127.0.0.1:9000", "null", "https://127.0.0.1:8000", ""):
        answer = client.post("/api/uploads", content=picture, headers={"origin": origin})
        assert answer.status_code == 403
        assert "another site" in answer.json()["error"]
    assert client.post("/api/uploads", content=picture, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert client.post("/api/uploads", content=picture, headers={"origin": SITE}).status_code == 200
    assert client.options("/api/runs", headers={"origin": "http://evil.example"}).status_code == 403
    assert (
        "access-control-allow-origin" not in client.get("/api/runs", headers={"origin": "http://evil.example"}).headers
    )


def test_requests_write_no_file(client, open_runs, runs):
    root = runs[0].folder.parent
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    number = upload(client, picture_bytes(open_runs, 1))
    client.get(f"/api/runs/0/uploads/{number}")
    client.get("/api/runs/0/latents")
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_failure_inside_is_told_without_its_insides(client, open_runs, monkeypatch):
    monkeypatch.setattr(open_runs[0], "pooled", lambda picked: 1 / 0)
    answer = client.get("/api/runs/0/images/0")
    assert answer.status_code == 500
    assert "ZeroDivisionError" in answer.json()["error"]
    assert "division by zero" not in answer.text


# --- the application ------------------------------------------------------------------------------
def app_config(*overrides: str) -> DictConfig:
    return composed("explore", "app=explorer", "split=train", *overrides)


def test_it_listens_on_this_machine_only(runs):
    with pytest.raises(ValueError, match=r"listens on 127\.0\.0\.1 only; app\.host=0\.0\.0\.0 is refused"):
        run(runs, app_config("app.host=0.0.0.0"))
    with listen("localhost", 0) as taken:
        assert taken.getsockname()[0] == "127.0.0.1"
        taken.listen()
        with pytest.raises(ValueError, match="taken by another program"):
            listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ValueError, match="Port 70000 cannot be had"):
        listen("127.0.0.1", 70000)


def browser() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def address(runs):
    """The whole application on a free port."""
    with served(application(runs, app_config())) as where:
        yield where


@contextmanager
def served(app):
    """``app`` on a free port, in a thread."""
    with listen("127.0.0.1", 0) as listening:
        server = server_of(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join(HANG)


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no chromium here")
@pytest.mark.parametrize("fragment", ["", "#picture=image:4&overlay=0", "#run=NAME&sort=latent&order=asc&least=0"])
def test_a_browser_shows_the_latents(address, open_runs, tmp_path, fragment):
    dumped = seen(address + fragment.replace("NAME", open_runs.runs[1].name), tmp_path)
    rows = [int(n) for n in re.findall(r'data-latent="(\d+)"', dumped)]
    run = int("run=" in fragment)
    view = open_runs[run]
    query = "sort=latent&order=asc&least=0" if run else f"sort=purity&order=desc&least={view.least}"
    client = TestClient(make_app(Explorer(open_runs, Captioner(None))), base_url=SITE)
    wanted = client.get(f"/api/runs/{run}/latents?{query}").json()["rows"]
    assert rows[:10] == [row["latent"] for row in wanted[:10]]
    assert 10 <= len(rows) < view.d_sae  # only those in sight
    if "picture" in fragment:
        assert "A picture of class" in dumped
        assert "Nearest pictures" in dumped
    else:
        assert "its strongest pictures" in dumped
    assert json.dumps(view.opened.label)[1:-1].split("·")[0].split("\\")[0] in dumped


def seen(address: str, folder) -> str:
    """The page as the browser has it after a while."""
    return subprocess.run(
        [browser(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", "--dump-dom",
         "--window-size=1400,1000", "--virtual-time-budget=20000", address],
        capture_output=True, text=True, timeout=HANG, check=True,
    ).stdout  # fmt: skip


def proxy(app, prefix: str, login: bool = False):
    """What a notebook hub does: ``app`` below ``prefix`` and nothing elsewhere; with ``login`` no data either."""

    async def answer(scope, receive, send):
        inner = scope["path"].removeprefix(prefix)
        if inner == scope["path"]:
            await PlainTextResponse("the hub", 404)(scope, receive, send)
        elif login and inner.startswith("/api"):
            await HTMLResponse("<h1>Log in</h1>")(scope, receive, send)
        else:
            await app({**scope, "path": inner or "/", "raw_path": (inner or "/").encode()}, receive, send)

    return answer


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no chromium here")
def test_a_browser_shows_the_latents_below_the_prefix_of_a_proxy(runs, tmp_path):
    with served(proxy(application(runs, app_config()), "/user/me/proxy/8765")) as address:
        dumped = seen(f"{address}user/me/proxy/8765#picture=image:4", tmp_path)  # no slash at its end
    assert len(re.findall(r'data-latent="(\d+)"', dumped)) >= 10
    assert "Nearest pictures" in dumped
    assert 'src="/user/me/proxy/8765/api/runs/0/images/4/over/' in dumped


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no chromium here")
def test_an_error_stays_on_the_page_instead_of_what_is_waited_for(runs, tmp_path):
    with served(proxy(application(runs, app_config()), "/p", login=True)) as address:
        dumped = seen(f"{address}p/", tmp_path)
    assert "Loading" not in dumped.partition("<script>")[0]
    assert re.search(
        r'<main[^>]*><p class="soft failed">http://\S+/p/api/runs answered with status 200, but not', dumped
    )
    assert re.search(r'id="toast" role="alert">http', dumped)  # not hidden again
