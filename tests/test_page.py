"""Tests of the scoring page in headless Chromium, against a stub of the scoring API."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin

import pytest
from PIL import Image

pytest.importorskip("playwright", reason="the page's tests need playwright (the dev extra)")
if not shutil.which("chromium"):
    pytest.skip("the page's tests need the program chromium on PATH", allow_module_level=True)

import reward_samples
import serving_samples
from page_stub import FILES, GENERATED, Stub, chromium, probabilities, score, served, stub_app
from playwright.sync_api import Page, Request, expect

from fgaif.config import with_overrides
from fgaif.data.scenes.draw import draw_scene
from fgaif.data.scenes.world import scene_at
from fgaif.feedback.segment import split_offsets
from fgaif.serving.app import create_app
from fgaif.types import DEFAULT_KINDS

BEFORE = (
    "There is a large yellow house. There is a small purple triangle, from the house the "
    "triangle is left. There is a large red star, from the triangle the star is above."
)
AFTER = "There is a large yellow house. There is a small green ring, from it the house is left."
WIDTHS = {1280: 860, 390: 844}
OPAQUE = 0.32  # share of the kind's colour behind a certain hallucination
CONTRAST = """() => {
  const pen = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data].map((v) => v / 255);
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const ground = (element) => {
    const own = rgba(getComputedStyle(element).backgroundColor);
    return own[3] > 0.99 ? own : over(own, ground(element.parentElement));
  };
  const light = (c) => c.slice(0, 3)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const seen = (element) => element.checkVisibility() && !element.closest(".hidden")
    && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  return [...document.body.querySelectorAll("*")].filter(seen).map((element) => {
    const below = ground(element);
    const ink = over(rgba(getComputedStyle(element).color), below);
    const [high, low] = [light(ink), light(below)].sort((a, b) => b - a);
    return [(high + 0.05) / (low + 0.05), `${element.className} ${element.textContent}`];
  });
}"""

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def tab() -> Iterator[Page]:
    """One tab for all tests; a new one would take most of a test's time."""
    with chromium() as browser:
        context = browser.new_context(
            reduced_motion="reduce", permissions=["clipboard-read", "clipboard-write"]
        )
        page = context.new_page()
        page.set_default_timeout(10_000)
        yield page


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Stub, str]]:
    stub = Stub()
    with served(stub_app(stub)) as url:
        yield stub, url


@pytest.fixture
def stub(running: tuple[Stub, str]) -> Stub:
    running[0].reset()
    return running[0]


@pytest.fixture
def base_url(running: tuple[Stub, str]) -> str:
    return running[1]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    draw_scene(scene_at("test", 3)).save(path)
    return path


@pytest.fixture
def visit(stub: Stub, tab: Page, base_url: str) -> Iterator[Open]:
    """Open the page anew; at the end, nothing went wrong in it and nothing left its origin."""
    wrong: list[str] = []
    asked: list[str] = []

    def note(request: Request) -> None:
        if not request.is_navigation_request():
            own = request.url.startswith(("data:", urljoin(tab.url, "/")))
            (asked if own else wrong).append(request.url)

    listeners = {
        "pageerror": lambda error: wrong.append(str(error)),
        "console": lambda message: wrong.append(message.text),
        "request": note,
    }
    for event, listener in listeners.items():
        tab.on(event, listener)

    def open_page(width: int = 1280, theme: str = "light") -> Page:
        tab.set_viewport_size({"width": width, "height": WIDTHS[width]})
        tab.emulate_media(color_scheme=theme)
        tab.goto(base_url)
        expect(tab.locator("#model")).not_to_be_empty()
        return tab

    yield open_page
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    tab.context.set_offline(False)
    tab.evaluate("sessionStorage.clear()")
    # The browser itself notes every answer that is an error.
    assert [text for text in wrong if not text.startswith("Failed to load resource")] == []
    assert asked


def likely(text: str, kind: str) -> int:
    """Class (0 NONE, 1 OK, 2 HALLU) that the stub finds most likely."""
    probs = probabilities(text, kind)
    return probs.index(max(probs))


@dataclass(frozen=True)
class Shown:
    """A segment as the page shows it; ``tint`` is the colour behind it, with its opacity."""

    text: str
    classes: list[str]
    chips: list[str]
    tint: str
    opacity: float


def segments(page: Page) -> list[Shown]:
    """All segments, their texts without their chips."""
    read = """all => all.map((s) => {
        const chips = [...s.querySelectorAll(".chip")].map((c) => c.textContent);
        const text = s.textContent.slice(0, s.textContent.length - chips.join("").length);
        return [text, [...s.classList], chips, getComputedStyle(s).backgroundColor];
    })"""
    shown = []
    for text, classes, chips, colour in page.locator(".segment").evaluate_all(read):
        match = re.fullmatch(r"color\(srgb ([\d. e-]+?)(?: / ([\d.e-]+))?\)", colour)
        assert match, colour
        shown.append(Shown(text, classes, chips, match[1], float(match[2] or 1)))
    return shown


def test_every_segment_is_coloured_by_its_worst_kind_and_probability(
    visit: Open, image: Path, stub: Stub
) -> None:
    page = visit()
    score(page, image, BEFORE)
    request = stub.asked[0]
    assert request.image.startswith("data:image/png;base64,")
    assert request.facts
    found = segments(page)
    assert " ".join(piece.text for piece in found) == BEFORE
    rewards = page.locator(".whole").evaluate_all(
        "all => all.map((s) => [s.dataset.reward, getComputedStyle(s, '::after').content])"
    )
    assert len(rewards) == len(found)
    for piece, (reward, drawn) in zip(found, rewards, strict=True):
        assert drawn == f'"{reward}"'  # without pointing at anything
        own = [probabilities(piece.text, kind) for kind in DEFAULT_KINDS]
        worth = sum(probs[1] - probs[2] for probs in own)
        assert float(reward.replace("−", "-")) == pytest.approx(worth, abs=0.02)
    colours = {}
    for piece in found:
        wrong = [kind for kind in DEFAULT_KINDS if likely(piece.text, kind) == 2]
        hallu = {kind: probabilities(piece.text, kind)[2] for kind in wrong or DEFAULT_KINDS}
        worst = max(hallu, key=hallu.get)
        assert piece.classes[-1] == f"kind-{DEFAULT_KINDS.index(worst)}"
        assert ("flagged" in piece.classes) == bool(wrong)
        assert piece.opacity == pytest.approx(OPAQUE * hallu[worst], abs=0.003)
        assert piece.chips == [f"{kind[0].upper()} {round(100 * hallu[kind])}%" for kind in wrong]
        if piece.opacity > 0.05:
            colours.setdefault(worst, set()).add(piece.tint)
    assert all(len(tints) == 1 for tints in colours.values())
    assert len(set.union(*colours.values())) == len(colours) > 1
    expect(page.locator("#made")).to_contain_text("scenes 3f9a1c20 in 12 ms")
    expect(page.locator("#made")).to_contain_text("supported +1.00, hallucinated −3.00")


def test_pointing_at_a_segment_shows_probabilities_and_facts(visit: Open, image: Path) -> None:
    page = visit()
    score(page, image, BEFORE)
    tip = page.get_by_role("tooltip")
    expect(tip).to_be_hidden()
    page.locator(".segment").nth(1).hover()
    expect(tip).to_be_visible()
    text = segments(page)[1].text
    for kind in DEFAULT_KINDS:
        probs = probabilities(text, kind)
        cells = tip.get_by_role("row", name=kind.title()).get_by_role("cell").all_text_contents()
        assert cells[:3] == [f"{round(100 * p)}%" for p in probs]
        assert float(cells[3].replace("−", "-")) == pytest.approx(probs[1] - probs[2], abs=0.006)
    expect(tip).to_contain_text("There is <b>number 1</b>.")
    tip.hover()
    page.wait_for_timeout(300)
    expect(tip).to_be_visible()
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_a_kind_can_be_chosen(visit: Open, image: Path) -> None:
    page = visit()
    score(page, image, BEFORE)
    page.get_by_role("radio", name="Any").focus()
    for kind in DEFAULT_KINDS:
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("radio", name=kind.title())).to_be_checked()
        for piece in segments(page):
            hallu = probabilities(piece.text, kind)[2]
            assert piece.opacity == pytest.approx(OPAQUE * hallu, abs=0.003)
            state = ["none", None, "flagged"][likely(piece.text, kind)]
            own = f"kind-{DEFAULT_KINDS.index(kind)}"
            assert piece.classes == ["segment", *([state] if state else []), own]
    score(page, image, AFTER)
    expect(page.get_by_role("radio", name=DEFAULT_KINDS[-1].title())).to_be_checked()


def test_two_texts_are_compared(visit: Open, image: Path, stub: Stub) -> None:
    page = visit()
    score(page, image, BEFORE, AFTER)
    assert stub.asked[0].text == [BEFORE, AFTER]
    expect(page.locator("#texts h2")).to_contain_text(["Before", "After"])
    rows = page.locator("#totals tbody tr").all()
    signs = str.maketrans("−", "-")
    values = [row.get_by_role("cell").all_text_contents() for row in rows]
    totals = [[float(value.translate(signs)) for value in row[1:]] for row in values[:2]]
    assert [len(row) for row in totals] == [4, 4]
    assert totals[0][3] == pytest.approx(sum(totals[0][:3]), abs=0.02)
    for at, change in enumerate(values[2][1:]):
        number, verdict = change.split()
        difference = totals[1][at] - totals[0][at]
        assert float(number.translate(signs)) == pytest.approx(difference, abs=0.011)
        assert verdict == ("better" if difference > 0 else "worse")
    counts = [[int(n) for n in row[0].split(" of ")] for row in values[:2]]
    means = [[float(value.translate(signs)) for value in row[1:]] for row in values[3:5]]
    for total, mean, (_, count) in zip(totals, means, counts, strict=True):
        assert mean == pytest.approx([value / count for value in total], abs=0.011)
    assert [row[0] for row in values[3:5]] == [f"{round(100 * n / of)}%" for n, of in counts]
    assert len(values) == 6
    boxes = page.locator(".read")
    for i in range(2):
        assert boxes.nth(i).locator(".segment").count() == counts[i][1]
        assert boxes.nth(i).locator(".flagged").count() == counts[i][0]
    left, right = (boxes.nth(i).bounding_box() for i in range(2))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    page.get_by_role("button", name="Score one text").click()
    score(page, image, AFTER)
    assert stub.asked[1].text == AFTER
    assert page.locator("#totals tbody tr").count() == 1


def test_everything_is_reached_by_keyboard(visit: Open) -> None:
    page = visit()
    passed = []

    focused = """() => {
        const it = document.activeElement;
        const ringed = it.closest(".drop, fieldset label") ?? it;
        return [it.id, it.textContent, getComputedStyle(ringed).outlineStyle];
    }"""

    def tab_to(name: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            *found, outline = page.evaluate(focused)
            assert outline == "solid", found
            if name in found:
                return
            passed.append(found[0])
        raise AssertionError(f"{name} not reached: {passed}")

    tab_to("example")
    page.keyboard.press("Enter")
    expect(page.locator("#text")).not_to_have_value("")
    tab_to("image")
    tab_to("text")
    page.keyboard.type("A dog. ")
    tab_to("compare")
    page.keyboard.press("Space")
    expect(page.locator("#text2")).to_be_focused()
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_contain_text("Scored. Before:")
    expect(page.locator("#text2")).to_be_focused()
    tab_to("Copy as JSON")
    page.keyboard.press("Tab")
    first = page.get_by_role("listbox", name="Before").get_by_role("option")
    expect(first.nth(0)).to_be_focused()
    expect(page.get_by_role("tooltip")).to_be_visible()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(first.nth(2)).to_be_focused()
    assert re.search(r"hallucination \d+%", first.nth(2).get_attribute("aria-label"))
    page.keyboard.press("End")
    expect(first.last).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("listbox", name="After").get_by_role("option").nth(0)).to_be_focused()
    page.keyboard.press("Shift+Tab")
    expect(first.last).to_be_focused()


def test_the_answer_is_copied_as_json(visit: Open, image: Path) -> None:
    page = visit()
    with page.expect_response("**/v1/score") as answer:
        score(page, image, BEFORE)
    page.get_by_role("button", name="Copy as JSON").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert json.loads(copied) == answer.value.json()
    # As without a secure context.
    page.evaluate("navigator.clipboard.writeText('')")
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error()); }")
    page.locator("#copy").click()
    expect(page.get_by_role("status")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == copied


def test_markup_and_characters_outside_the_basic_plane_are_text(visit: Open, image: Path) -> None:
    text = (
        "A 🐕 & <img src=x onerror=alert(1)> sit here.\n\n<script>alert(2)</script> and 🐈 sleep."
    )
    page = visit()
    score(page, image, text)
    assert page.locator("#texts :is(img, script)").count() == 0
    assert [piece.text for piece in segments(page)] == text.split("\n\n")


def test_generating_fills_the_text(visit: Open, image: Path, stub: Stub) -> None:
    stub.generates = False
    page = visit()
    expect(page.get_by_role("button", name="Generate")).to_be_hidden()
    stub.generates = True
    page.reload()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#image-error")).to_have_text("Choose an image.")
    page.locator("#image").set_input_files(image)
    expect(page.locator("#preview")).to_be_visible()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#text")).to_have_value(GENERATED)


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_an_image_is_dropped_or_pasted(visit: Open, event: str) -> None:
    page = visit()
    give = """async ([event, type]) => {
        const canvas = new OffscreenCanvas(8, 8);
        canvas.getContext("2d").fillRect(0, 0, 8, 8);
        const data = new DataTransfer();
        data.items.add(new File([await canvas.convertToBlob()], "given", {type}));
        const made = event === "drop"
            ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: data, bubbles: true});
        document.body.dispatchEvent(made);
    }"""
    page.evaluate(give, [event, "text/plain"])
    expect(page.locator("#image-error")).to_have_text("given is not an image.")
    page.evaluate(give, [event, "image/png"])
    expect(page.locator("#preview")).to_be_visible()
    expect(page.locator("#image-error")).to_be_empty()
    expect(page.locator("#image-name")).to_have_text("given")


def test_missing_fields_are_named_beside_them(visit: Open, stub: Stub) -> None:
    page = visit()
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.locator("#image-error")).to_have_text("Choose an image.")
    expect(page.locator("#text-error")).to_have_text("Enter a text.")
    expect(page.locator("#image")).to_be_focused()
    expect(page.locator("#text")).to_have_attribute("aria-invalid", "true")
    page.get_by_role("button", name="Try an example").click()
    expect(page.locator("#text-error")).to_be_empty()
    assert stub.asked == []


def test_an_error_of_the_server_is_shown_where_it_belongs(visit: Open, image: Path) -> None:
    page = visit()
    score(page, image, BEFORE, AFTER)
    places = {
        413: ("image-error", "the body is larger than 8388608 bytes"),
        422: ("text2-error", "text.1: 20,001 characters, but at most 20,000"),
        500: ("alert", "internal error"),
    }
    for status, (place, message) in places.items():
        page.locator("#text2").fill(f"answer {status}")
        page.locator("#score").click()
        expect(page.locator(f"#{place}")).to_have_text(message)
        expect(page.locator("#score")).not_to_have_attribute("aria-disabled", "true")
        shown = page.locator(":is(.error, #alert):not(:empty)")
        assert shown.evaluate_all("all => all.map(e => e.id)") == [place]
        if place != "alert":
            field = page.locator(f"#{place.removesuffix('-error')}")
            expect(field).to_be_focused()
            assert place in field.get_attribute("aria-describedby").split()
    page.locator("#text2").fill(AFTER)
    page.locator("#score").click()
    expect(page.get_by_role("status")).to_contain_text("Scored.")
    expect(page.locator("#alert")).to_be_empty()


def test_a_busy_server_is_asked_again_after_the_time_it_named(
    visit: Open, image: Path, stub: Stub
) -> None:
    page = visit()
    stub.busy = 1
    page.locator("#image").set_input_files(image)
    page.locator("#text").fill(BEFORE)
    page.locator("#score").click()
    expect(page.locator("#countdown")).to_have_text("Trying again in 1 s")
    expect(page.get_by_role("status")).to_contain_text("The server is busy")
    expect(page.get_by_role("status")).to_contain_text("Scored.")
    expect(page.locator("#wait")).to_be_hidden()
    assert len(stub.asked) == 2
    stub.busy = 9
    page.locator("#score").click()
    page.get_by_role("button", name="Stop waiting").click()
    expect(page.get_by_role("alert")).to_contain_text("too many requests wait")
    assert len(stub.asked) == 3


def test_a_server_that_cannot_be_reached_is_said(visit: Open, image: Path) -> None:
    page = visit()
    score(page, image, BEFORE)
    page.context.set_offline(True)
    page.locator("#score").click()
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    assert page.locator(".segment").count() > 0


def test_one_request_runs_at_a_time_and_is_seen_to_run(
    visit: Open, image: Path, stub: Stub
) -> None:
    page = visit()
    stub.delay = 0.4
    page.locator("#image").set_input_files(image)
    page.locator("#text").fill(BEFORE)
    page.locator("#score").dblclick()
    expect(page.locator("#score")).to_have_text("Scoring…")
    expect(page.locator("#score")).to_have_attribute("aria-disabled", "true")
    expect(page.locator("#results")).to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("status")).to_contain_text("Scored.")
    expect(page.locator("#results")).not_to_have_attribute("aria-busy", "true")
    assert len(stub.asked) == 1


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(visit: Open, image: Path, stub: Stub) -> None:
    page = visit()
    expect(page.get_by_label("API key")).to_be_hidden()
    stub.key = "right-key"
    page.locator("#image").set_input_files(image)
    page.locator("#text").fill(BEFORE)
    page.locator("#score").click()
    expect(page.get_by_label("API key")).to_be_focused()
    expect(page.locator("#key-error")).to_have_text("The server asks for an API key.")
    page.keyboard.type("wrong-key")
    page.keyboard.press("Enter")
    expect(page.locator("#key-error")).to_have_text("The server refused this key.")
    page.get_by_label("API key").fill("clé")
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#key-error")).to_contain_text("plain letters")
    page.get_by_label("API key").fill("right-key")
    page.get_by_role("button", name="Use key").click()
    expect(page.get_by_role("status")).to_contain_text("Scored.")
    expect(page.get_by_label("API key")).to_be_hidden()
    assert page.evaluate("Object.values(sessionStorage)") == ["right-key"]
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    page.reload()
    expect(page.locator("#model")).not_to_be_empty()
    expect(page.get_by_label("API key")).to_be_hidden()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_readable_in_both_themes_and_widths(
    visit: Open, image: Path, tmp_path: Path, width: int, theme: str
) -> None:
    """AA contrast (4.5) of every text, nothing wider than the window, a picture of the theme."""
    page = visit(width, theme)
    score(page, image, BEFORE, AFTER)
    page.locator("#text2").fill("answer 422")
    page.locator("#score").click()
    expect(page.locator("#text2-error")).not_to_be_empty()
    page.get_by_role("radio", name="Relation").check()
    page.locator(".segment").nth(1).focus()
    expect(page.get_by_role("tooltip")).to_be_visible()
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 60
    assert [found for found in contrasts if found[0] < 4.5] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.get_by_role("tooltip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    shot = tmp_path / f"page-{width}-{theme}.png"
    page.screenshot(path=shot, full_page=True)
    picture = Image.open(shot).convert("L")
    assert picture.width == width
    bright = sum(picture.histogram()[128:]) / (picture.width * picture.height)
    assert bright > 0.7 if theme == "light" else bright < 0.3
    assert len(picture.getcolors()) > 50


def test_it_works_on_the_application_itself(
    visit: Open, image: Path, tiny_llava_dir: Path, tmp_path: Path
) -> None:
    """With the service's own headers, key and errors, and with models (random ones)."""
    rewards = serving_samples.write_rewards(tiny_llava_dir, tmp_path / "rewards")
    config = with_overrides(reward_samples.settings(tiny_llava_dir), ["serve.max_body_mib=0.01"])
    backend = serving_samples.LocalBackend(rewards, config)
    page = visit()
    with served(create_app(backend, config, key="right-key")) as url:
        page.goto(url)
        page.get_by_label("API key").fill("right-key")
        page.get_by_role("button", name="Use key").click()
        expect(page.locator("#model")).to_contain_text(backend.actor.probe())
        score(page, image, BEFORE, AFTER)
        for shown, text in zip(page.locator(".read").all(), (BEFORE, AFTER), strict=True):
            count = shown.locator(".segment").count()
            assert count == len(split_offsets(text, 5)) - 1
        page.locator("#text2").fill("a dog " * 3000)
        page.locator("#score").click()
        expect(page.locator("#image-error")).to_contain_text("the body is larger than")
        page.locator("#text2").fill("a dog " * 500)
        page.locator("#score").click()
        expect(page.locator("#text2-error")).to_contain_text("tokens with image and prompt")


def test_the_files_are_small_and_name_no_other_place() -> None:
    files = [FILES / name for name in ("index.html", "page.css", "page.js")]
    assert sum(path.stat().st_size for path in files) < 38_000
    for path in files:
        source = path.read_text()
        assert not re.search(r"https?://|innerHTML|insertAdjacent|eval\(| on\w+=| style=", source)
