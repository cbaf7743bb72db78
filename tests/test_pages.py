"""The pages: the report about runs, and the app; what they hold, what they refuse, and how a real browser shows them."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, dit_ds, environment, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from werkzeug.test import Client

import dit_ds as package
from dit_ds.data.picture import read_picture
from dit_ds.pages import app as app_module
from dit_ds.pages import html, report, run_folder
from dit_ds.pages.app import App
from dit_ds.pages.app_model import AppModel

SCREENSHOTS = Path(__file__).parent / "screenshots"  # to look at; not in git

ATTACK = "</script></td><script>window.attacked = 1</script><img src=x onerror='window.attacked = 1'>{{ 7 * 7 }}"


@pytest.fixture(scope="session")
def run(shards, tmp_path_factory) -> Path:
    """A run of a few steps."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(shards, folder / "tiny")
    config["train"]["max_steps"] = 8
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    dit_ds("train", "--config", folder / "tiny.yaml")
    return folder / "tiny"


@pytest.fixture(scope="session")
def bare_run(run, tmp_path_factory) -> Path:
    """The same without checkpoints."""
    folder = tmp_path_factory.mktemp("bare") / "bare"
    return Path(shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "frozen", "best.json")))


@pytest.fixture
def attacked_run(bare_run, tmp_path) -> Path:
    """A run from someone who would like the reader's browser to run a script."""
    folder = Path(shutil.copytree(bare_run, tmp_path / "<b>run"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["run_dir"] = config["deepspeed"]["config"] = ATTACK
    config["data"]["dataset"] = ATTACK.replace("/", "")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(
        json.dumps({ATTACK: ATTACK, "gpu": ATTACK, "versions": {"torch": [ATTACK]}})
    )
    with open(folder / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"kind": "train", "step": 99, "loss": ATTACK, ATTACK: 1.0}) + '\n["no"]\n{"kind": "tra')
    return folder


class Tags(HTMLParser):
    """The elements of a page with the names of their attributes, and the addresses in it."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, tuple(name for name, _ in attributes)))
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]


# --- the report ---------------------------------------------------------------------------------------------------


def test_a_report_of_two_runs(run, bare_run, tmp_path):
    out = tmp_path / "new/report.html"
    done = dit_ds("report", run, bare_run, "--out", out, "--examples", "20", "--shown", "2", "--json", real=True)
    result, page = json.loads(done.stdout), out.read_text()
    assert result["runs"] == [str(run), str(bare_run)] and result["bytes"] == out.stat().st_size < 5e6
    assert [line.startswith("bare: ") for line in result["missing"]] == [True]  # it has no checkpoint
    for text in ("Side by side", "Table 1", "refcoco/unc val: 20 of", "Worst", "Best", "data.image_size", "best mIoU"):
        assert text in page, text
    parsed = Tags(page)
    assert {a.split(":")[0] for a in parsed.addresses if not a.startswith("#")} == {"data"}
    assert parsed.tags.count(("figure", ())) + parsed.tags.count(("figure", ("class",))) == 2 * 2 * 3
    head = page[: page.index("<title>")]
    assert "default-src 'none'" in head.replace("&#39;", "'") and "connect-src" not in head
    curves = json.loads(page.split('id="curve-data">')[1].split("</script>")[0])
    assert [c["name"] for c in curves] == ["tiny", "bare"] and curves[0]["train"]["step"] == list(range(1, 9))
    assert len(curves[0]["eval"]["miou"]) == 1


def test_what_a_report_lacks_is_said(bare_run, tmp_path, refusal, capsys):
    out = tmp_path / "r.html"
    (empty := tmp_path / "empty").mkdir()
    shutil.copy(bare_run / "config.yaml", empty)
    from dit_ds.cli.entry import main

    assert main(["report", str(empty), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "has no evaluation yet" in lines[0] and "no checkpoint" in lines[1] and lines[-1].startswith(f"wrote {out}")
    assert main(["report", str(empty), "--out", str(out), "--examples", "0", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["missing"]) == 1
    assert "is no run" in refusal("report", tmp_path, "--out", out)
    assert "let it end in .html" in refusal("report", empty, "--out", tmp_path / "r.txt")
    (empty / "config.yaml").write_text("trian: 1")
    assert "did you mean 'train'" in refusal("report", empty, "--out", out)


def rendered(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page about a run, without predictions and what draws plots."""
    monkeypatch.setattr(html, "plot_library", lambda: "")
    out = path.parent / "page.html"
    report.write_report([str(path)], str(out), looked_at=0)
    return out.read_text()


def test_a_strangers_run_is_text(attacked_run, monkeypatch):
    page = rendered(attacked_run, monkeypatch)
    assert "<img src=x" not in page and "window.attacked = 1</script>" not in page and ">49<" not in page
    assert [tag for tag, _ in Tags(page).tags].count("script") == 3


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.text(max_size=30), value=st.recursive(st.text() | st.floats() | st.none(), st.lists, max_leaves=4))
def test_no_text_of_a_run_changes_the_page_around_it(key, value, bare_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any") / "run"
    folder.mkdir()
    shutil.copy(bare_run / "config.yaml", folder)
    with pytest.MonkeyPatch.context() as patch:
        pages = []
        for environment_of in ({"a": "b"}, {key: value}):
            (folder / "environment.json").write_text(json.dumps(environment_of))
            pages.append(Tags(rendered(folder, patch)).tags)
    assert pages[0] == pages[1]


@given(st.lists(st.dictionaries(st.sampled_from(["loss", "lr"]), st.floats(-1e6, 1e6)), max_size=40))
def test_a_long_run_is_thinned_to_its_means(lines):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "POINTS", 7)
        columns, together = run_folder._thinned([{"step": i} | line for i, line in enumerate(lines)])
    if not lines:
        assert columns == {}
        return
    assert len(columns["step"]) == -(-len(lines) // together) <= 7 and columns["step"][-1] == len(lines) - 1
    for name in ("loss", "lr"):
        for i, value in enumerate(columns.get(name, [])):
            values = [x[name] for x in lines[i * together : (i + 1) * together] if name in x]
            assert value == (pytest.approx(np.mean(values), rel=1e-4, abs=1e-9) if values else None)


# --- the app ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(model_file) -> AppModel:
    return AppModel(str(model_file))


@pytest.fixture(scope="module")
def client(model) -> Client:
    return Client(App(model, model.samples(None, None), "127.0.0.1"))


@pytest.fixture(scope="module")
def picture(refer_tree) -> Path:
    return sorted((refer_tree / "images/train2014").iterdir())[0]


def send(client: Client, data: bytes, **more: object) -> tuple[int, dict]:
    more = {"content_type": "application/octet-stream", "base_url": "http://127.0.0.1:7860/"} | more
    done = client.post("/pictures", data=data, **more)
    return done.status_code, done.json


def ask(client: Client, **asked: object) -> tuple[int, dict]:
    done = client.post("/segment", json=asked, base_url="http://localhost:7860/")
    return done.status_code, done.json


def test_the_app_answers_as_the_python_interface_does(client, model_file, picture):
    status, sent = send(client, picture.read_bytes())
    height, width = read_picture(picture).shape[:2]
    assert status == 200 and (sent["height"], sent["width"]) == (height, width)
    predictor = package.load(str(model_file))
    for prompt in ({"text": "the Left star!"}, {"points": [(10.5, 20)]}, {"text": "star", "box": (5, 6, 40, 50)}):
        status, answer = ask(client, picture=sent["id"], **prompt)
        mask, score = predictor.segment(str(picture), **prompt)
        file = Image.open(io.BytesIO(base64.b64decode(answer["file"].partition(",")[2])))
        assert status == 200 and (np.asarray(file) == mask).mean() > 0.999
        assert answer["score"] == pytest.approx(score, abs=1e-3) and answer["covered"] == pytest.approx(
            mask.mean(), abs=1e-3
        )
        assert [x["title"] for x in answer["layers"]] == (
            [f"layer {i}" for i in (1, 2, 3, 4)] if "text" in prompt else []
        )


def test_the_app_refuses_in_one_line(client, picture, monkeypatch):
    _, sent = send(client, picture.read_bytes())
    wrong = [
        (400, "no word", {"picture": sent["id"], "text": "!?"}),
        (400, "nothing says what to segment", {"picture": sent["id"]}),
        (400, "is outside the picture", {"picture": sent["id"], "points": [[-5, 3]]}),
        (400, "has no inside", {"picture": sent["id"], "box": [5, 5, 5, 9]}),
        (400, "it does not read", {"picture": sent["id"], "points": [[1, 2, 3]]}),
        (400, "it does not read", {"picture": sent["id"], "box": ["x", 1, 2, 3]}),
        (400, "it does not read", {"picture": 1, "text": "star"}),
        (404, "choose it again", {"picture": "gone", "text": "star"}),
        (404, "choose it again", {"picture": "sample-99", "text": "star"}),
        (413, "make it smaller", {"picture": sent["id"], "text": "star " * 20_000}),
    ]
    for status, says, asked in wrong:
        found, answer = ask(client, **asked)
        assert (found, says in answer["error"], "\n" in answer["error"]) == (status, True, False), (asked, answer)
    for data in (b"", b"no picture", b"\x89PNG\r\n\x1a\n??", picture.read_bytes()[:200], b"GIF89a"):
        status, answer = send(client, data)
        assert status == 400 and answer["error"].startswith("cannot read the picture"), answer
    monkeypatch.setattr(app_module, "_MOST_PIXELS", 1000)
    assert "make it smaller" in send(client, picture.read_bytes())[1]["error"]
    monkeypatch.setattr(app_module, "MOST_BYTES", 1000)
    assert send(client, picture.read_bytes())[0] == 413


def test_the_app_answers_to_its_own_page_alone(client, picture):
    """Neither a name that was made to lead here, nor a page of another place."""
    for host in ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "a@127.0.0.1:1:2", "[::1"):
        assert client.get("/", headers={"Host": host}).status_code in (400, 421), host
    for host in ("127.0.0.1:7860", "localhost", "[::1]:80", "192.168.1.7:7860"):
        assert client.get("/", headers={"Host": host}).status_code == 200
    other = {"headers": {"Origin": "http://evil.example"}}
    assert send(client, picture.read_bytes(), **other)[0] == 403
    assert send(client, picture.read_bytes(), headers={"Origin": "http://127.0.0.1:7860"})[0] == 200
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"):
        assert send(client, picture.read_bytes(), content_type=kind)[0] == 415
    page = client.get("/", base_url="http://127.0.0.1/")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert all(a.startswith(("/", "data:")) and not a.startswith("//") for a in Tags(page.text).addresses)


def test_the_app_forgets_old_pictures(client, picture):
    names = [send(client, picture.read_bytes())[1]["id"] for _ in range(app_module._KEPT + 1)]
    assert [ask(client, picture=name, text="star")[0] for name in (names[0], names[-1])] == [404, 200]


def test_addresses_that_the_app_can_not_have(model_file, refusal):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = refusal("app", model_file, "--port", taken.getsockname()[1])
        assert "Address already in use" in line and "--port" in line
    assert "is no address of this machine" in refusal("app", model_file, "--host", "no.such.host.invalid")
    assert "cannot listen" in refusal("app", model_file, "--host", "192.0.2.1")
    assert "no checkpoint" in refusal("app", "nowhere", "--port", 0)


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture
def page() -> Iterator:
    """A page of a headless Chromium; what it complains of is in `page.complaints`, what it asks for in `page.asked`."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        SCREENSHOTS.mkdir(exist_ok=True)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.complaints, page.asked = [], []
        page.on("console", lambda said: page.complaints.append(said.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        yield page
        browser.close()


def test_a_report_in_a_browser(page, run, attacked_run, tmp_path):
    out = tmp_path / "report.html"
    report.write_report([str(run), str(attacked_run)], str(out), looked_at=30, shown=3)
    page.goto(out.as_uri())
    page.wait_for_selector("body[data-drawn]")
    assert page.locator(".plot svg.marks").count() >= 7
    assert page.locator(".example img").evaluate_all("all => all.every((one) => one.naturalWidth > 0)")
    page.locator(".plot svg.marks").first.hover()
    page.screenshot(path=SCREENSHOTS / "report.png", full_page=True)
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=SCREENSHOTS / "report_dark.png", full_page=True)
    assert page.evaluate("window.attacked") is None and page.complaints == []
    assert {url.split(":")[0] for url in page.asked} <= {"file", "data"} and page.asked.count(out.as_uri()) == 1


def test_the_app_in_a_browser(page, model_file, picture, tmp_path):
    command = [sys.executable, "-m", "dit_ds.cli", "app", str(model_file), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()) as server:
        try:
            url = json.loads(server.stdout.readline())["url"]
            page.goto(url)
            page.screenshot(path=SCREENSHOTS / "app_empty.png", full_page=True)
            page.locator("[data-sample]").first.click()
            result, mask = page.locator("#result"), page.locator("#mask")
            result.wait_for()
            first = mask.get_attribute("src")
            assert page.locator("#layers img").count() == 4
            page.locator("#text").fill("the large blue thing at the top")  # a typed expression changes the mask
            page.wait_for_function("first => document.querySelector('#mask').src !== first", arg=first)
            page.screenshot(path=SCREENSHOTS / "app_words.png", full_page=True)
            page.locator("#file").set_input_files(picture)
            page.locator("#text").fill("")
            result.wait_for(state="hidden")
            page.locator("#marks").click(position={"x": 60, "y": 50})
            result.wait_for()
            page.get_by_label("drag: a box").check()
            edge = page.locator("#marks").bounding_box()
            page.mouse.move(edge["x"] + 30, edge["y"] + 30)
            page.mouse.down()
            page.mouse.move(edge["x"] + 150, edge["y"] + 120)
            page.mouse.up()
            page.locator("body:not(.waiting)").wait_for()
            assert page.locator("#marks circle").count() == page.locator("#marks rect").count() == 1
            page.screenshot(path=SCREENSHOTS / "app_places.png", full_page=True)
            assert page.complaints == []
            (tmp_path / "bad.png").write_bytes(b"no picture")
            page.locator("#file").set_input_files(tmp_path / "bad.png")
            page.locator("#error").wait_for()
            assert "cannot read the picture" in page.locator("#error").inner_text()
            page.screenshot(path=SCREENSHOTS / "app_error.png", full_page=True)
            assert {x.split("/")[2] for x in page.asked if not x.startswith("data:")} == {url.split("/")[2]}
            assert url.startswith("http://127.0.0.1:")
        finally:
            server.kill()
