"""The gallery's page in a real Chromium: what a person does with it, and what no caption may do to it."""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, FloatRect, Locator, ViewportSize, sync_playwright
from playwright.sync_api import Page as Tab

from captioner.config import GalleryConfig
from captioner.gallery import Card, Page, Text, write_page
from captioner.gallery.caption_cards import caption_card, pair_card
from captioner.gallery.gallery_job import gallery
from captioner.images.thumbnails import Thumbnail
from captioner.schema import Reject, RejectReason
from tests.caption_tables import add_part, begin_table, caption_row
from tests.sample_images import encoded

pytestmark = pytest.mark.browser

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_WINDOW = ViewportSize(width=1280, height=900)
_PATIENCE_S = 200
_SUBJECTS = ("a brown dog", "two red cars", "an old bridge", "a tall woman")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium as the system has it, with a fresh profile."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        assert "REQUIRE_CHROMIUM" not in os.environ, "REQUIRE_CHROMIUM is set, and there is no Chromium"
        pytest.skip("no Chromium found: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=_FLAGS)
        yield chromium
        chromium.close()


@dataclass
class Visit:
    """A tab with a page open, and whatever it complained of or asked the network for."""

    tab: Tab
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)

    def shown(self) -> list[str]:
        """The captions on the screen, in their order."""
        return self.tab.locator(".card:not([hidden]) .texts").all_text_contents()

    def wait_until(self, condition: str) -> None:
        """Wait for something in the page; Playwright's own way is an eval, which the page's policy forbids."""
        give_up = time.monotonic() + _PATIENCE_S
        while not self.tab.evaluate(condition):
            assert time.monotonic() < give_up, condition
            self.tab.wait_for_timeout(20)

    def numbers(self) -> list[int]:
        """The numbers at the end of the names of the cards on the screen."""
        names = self.tab.locator(".card:not([hidden]) .name").all_text_contents()
        return [int(name.removesuffix(".jpg")) for name in names]


Open = Callable[..., Visit]


def box(found: Locator) -> FloatRect:
    """Where an element is on the screen."""
    rect = found.bounding_box()
    assert rect is not None
    return rect


def top(found: Locator) -> float:
    return box(found)["y"]


def bottom(found: Locator) -> float:
    return box(found)["y"] + box(found)["height"]


@pytest.fixture(scope="module")
def blank_visits() -> list[Visit]:
    """Visits that ended: a tab of its own for each test takes Chromium longer than the test."""
    return []


@pytest.fixture
def visit(browser: Browser, blank_visits: list[Visit]) -> Iterator[Open]:
    """Opens pages; at the end none of them may have complained, or asked for anything."""
    visits: list[tuple[Visit, bool]] = []

    def open_page(path: Path, fragment: str = "", viewport: ViewportSize = _WINDOW, **context: Any) -> Visit:
        found = blank_visits.pop() if blank_visits and not context else new_visit(browser, **context)
        visits.append((found, bool(context)))
        found.tab.set_viewport_size(viewport)
        found.tab.goto(path.as_uri() + (f"#{fragment}" if fragment else ""))
        return found

    yield open_page
    for found, has_own_context in visits:
        complaints, requests = list(found.complaints), list(found.requests)
        if has_own_context:
            found.tab.context.close()
        else:
            blank_visits.append(blank(found))
        assert complaints == []
        assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def new_visit(browser: Browser, **context: Any) -> Visit:
    tab = browser.new_context(**context).new_page()
    tab.set_default_timeout(_PATIENCE_S * 1000)
    found = Visit(tab)
    tab.on("console", lambda message: found.complaints.append(message.text))
    tab.on("pageerror", lambda error: found.complaints.append(str(error)))
    tab.on("dialog", lambda dialog: found.complaints.append(dialog.message))
    tab.on("request", lambda request: found.requests.append(request.url))
    tab.on("response", lambda response: found.answers.append(response.url))
    return found


def blank(visit: Visit) -> Visit:
    """The tab as if it were new."""
    visit.tab.goto("about:blank")
    visit.tab.mouse.move(0, 0)
    for heard in (visit.complaints, visit.requests, visit.answers):
        heard.clear()
    return visit


def thumbnail(seed: int = 0) -> Thumbnail:
    return Thumbnail(encoded("WEBP", seed), 48, 40)


def card(number: int) -> Card:
    """Card N says N words more than three, and is the surer the higher N; every fifth failed."""
    if number % 5 == 4:
        refusal = Reject(RejectReason.CORRUPT, "JPEG: cut short")
        return Card(image_id=f"in/{number:03d}.jpg", image=refusal, texts=[], tags=["corrupt"])
    caption = f"{_SUBJECTS[number % 4]} " + " ".join(["very"] * number) + " near a café"
    facts = {"mean_logprob": number / 100 - 1, "key": str(number)}
    tag = "length" if number % 5 == 3 else "stop"
    return Card(
        image_id=f"in/{number:03d}.jpg", image=thumbnail(number), texts=[Text.of(caption)], facts=facts, tags=[tag]
    )


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty cards, listed from the last to the first."""
    path = tmp_path_factory.mktemp("grid") / "out.html"
    cards = [card(number) for number in reversed(range(20))]
    write_page(Page(title="Twenty", cards=cards, lines=["One line."], scores=["mean_logprob"]), str(path))
    return path


def test_search_finds_words_of_captions_and_names_whatever_their_accents_and_case(visit: Open, grid: Path) -> None:
    page = visit(grid)
    page.tab.keyboard.press("/")
    page.tab.keyboard.type("CAFE bridge")
    assert page.numbers() == [18, 10, 6, 2]
    assert page.tab.inner_text("#count") == "4 of 20 images"
    assert page.tab.evaluate("CSS.highlights.get('found').size") == 8
    page.tab.fill("#find", "007.jpg")
    assert page.numbers() == [7]
    page.tab.fill("#find", "no such thing")
    page.tab.click("#clear")
    assert len(page.numbers()) == 20


def test_sorting_goes_by_score_words_or_name_either_way_round_with_failures_last(visit: Open, grid: Path) -> None:
    page = visit(grid)
    captioned = [number for number in range(20) if number % 5 != 4]
    assert page.numbers() == [*reversed(captioned), 19, 14, 9, 4]
    for kind in ("fact:mean_logprob", "words"):
        page.tab.select_option("#sort", kind)
        assert page.numbers() == [*captioned, 19, 14, 9, 4]
    page.tab.click("#turn")
    assert page.numbers() == [*reversed(captioned), 19, 14, 9, 4]
    page.tab.select_option("#sort", "name")
    assert page.numbers() == [*reversed(captioned), 19, 14, 9, 4]
    page.tab.click("#turn")
    assert page.numbers() == [*captioned, 4, 9, 14, 19]
    assert page.tab.inner_text("h2") == "4 images without a caption"
    heading, first_failed = page.tab.locator("h2"), page.tab.locator(".card:not([hidden])").nth(16)
    assert bottom(page.tab.locator(".card:not([hidden])").nth(15)) <= top(heading) < top(first_failed)
    page.tab.click("#tags button[value=stop]")
    assert page.tab.locator("h2").is_hidden()


def test_filters_are_reasons_finish_reasons_and_lengths(visit: Open, grid: Path) -> None:
    page = visit(grid)
    page.tab.click("#tags button[value=corrupt]")
    assert page.numbers() == [19, 14, 9, 4]
    assert page.tab.locator(".none").first.inner_text() == "corrupt\nJPEG: cut short"
    page.tab.click("#tags button[value=length]")
    assert page.numbers() == [18, 13, 8, 3, 19, 14, 9, 4]
    page.tab.click("#tags button[value=corrupt]")
    page.tab.click("#tags button[value=length]")
    page.tab.fill("#fewest", "8")
    page.tab.fill("#most", "9")
    assert all(8 <= len(text.split()) <= 9 for text in page.shown())
    assert page.numbers() != []


def test_the_keyboard_moves_enlarges_and_comes_back(visit: Open, grid: Path) -> None:
    page = visit(grid)
    focused = "document.activeElement.getAttribute('aria-label')"
    for key, expected in (("ArrowRight", 18), ("j", 17), ("ArrowRight", 16), ("k", 17), ("ArrowLeft", 18), ("End", 4)):
        page.tab.keyboard.press(key)
        assert page.tab.evaluate(focused) == f"Enlarge in/{expected:03d}.jpg", key
    page.tab.keyboard.press("ArrowUp")
    page.tab.keyboard.press("ArrowDown")
    assert page.tab.evaluate(focused) == "Enlarge in/004.jpg"
    page.tab.keyboard.press("Home")
    page.tab.keyboard.press("Enter")
    assert page.tab.locator("#large").is_visible()
    page.tab.keyboard.press("ArrowRight")
    assert "near a café" in page.tab.inner_text("#large-text")
    assert page.tab.inner_text("#place") == "2 of 20"
    assert "\u22120.83" in page.tab.inner_text("#large-facts")
    page.tab.keyboard.press("Escape")
    assert page.tab.locator("#large").is_hidden()
    assert page.tab.evaluate(focused) == "Enlarge in/017.jpg"
    page.tab.keyboard.press("ArrowRight")
    assert page.tab.evaluate(focused) == "Enlarge in/016.jpg"


FOCUSED = "document.activeElement.getAttribute('aria-label')"


def test_home_and_end_go_to_the_ends_of_a_page_before_any_other_key(visit: Open, grid: Path) -> None:
    page = visit(grid)
    page.tab.keyboard.press("End")
    assert page.tab.evaluate(FOCUSED) == "Enlarge in/004.jpg"
    page.tab.reload()
    page.tab.keyboard.press("Home")
    assert page.tab.evaluate(FOCUSED) == "Enlarge in/018.jpg"


@pytest.mark.parametrize(("key", "is_large"), [("j", False), ("Enter", True)])
def test_the_keyboard_begins_where_the_page_is_scrolled_to(visit: Open, grid: Path, key: str, is_large: bool) -> None:
    page = visit(grid)
    page.tab.evaluate("scrollTo(0, document.body.scrollHeight / 2)")
    page.wait_until("scrollY > 300")
    before = page.tab.evaluate("scrollY")
    page.tab.keyboard.press(key)
    assert page.tab.locator("#large").is_visible() == is_large
    assert abs(page.tab.evaluate("scrollY") - before) < 500
    where = "document.getElementById('place').textContent" if is_large else FOCUSED
    assert page.tab.evaluate(where) not in ("1 of 20", "Enlarge in/018.jpg")


def test_integers_are_shown_whole_and_columns_with_a_colon_are_sorted_by(visit: Open, tmp_path: Path) -> None:
    name = "clip_score, s3://bucket/captions"
    facts = [
        {"size_bytes": 1234567 + n, "big": 2**60 + n, name: [0.3, 0.1, 0.2][n], "key": f"42949{n}"} for n in range(3)
    ]
    cards = [Card(image_id=f"{n}.jpg", image=thumbnail(), texts=[], facts=facts[n]) for n in range(3)]
    write_page(Page(title="Three", cards=cards, scores=["big"]), str(tmp_path / "out.html"))
    page = visit(tmp_path / "out.html")
    assert page.tab.locator(".about b").all_text_contents() == [str(2**60 + n) for n in range(3)]
    page.tab.select_option("#sort", f"fact:{name}")
    assert page.numbers() == [1, 2, 0]
    page.tab.locator(".frame").first.click()
    assert "1234568" in page.tab.inner_text("#large-facts")
    page.tab.keyboard.press("Escape")
    for digits in ("42949", "1152921504606846"):
        page.tab.fill("#find", digits)
        assert page.numbers() == []


@pytest.mark.parametrize("search", ["café", "cafe", "CAFÉ"])
def test_the_words_searched_for_are_marked_whatever_their_accents(visit: Open, tmp_path: Path, search: str) -> None:
    texts = ("a café", "un cafe\u0301 noir", "CAFE")
    cards = [Card(image_id=text, image=thumbnail(), texts=[Text.of(text)]) for text in texts]
    write_page(Page(title="Coffee", cards=cards), str(tmp_path / "out.html"))
    page = visit(tmp_path / "out.html")
    page.tab.fill("#find", search)
    marked = "[...CSS.highlights.get('found')].map((r) => r.startContainer.data.slice(r.startOffset, r.endOffset))"
    assert page.tab.evaluate(marked) == ["café", "café", "cafe\u0301", "cafe\u0301", "CAFE", "CAFE"]


def test_words_are_counted_in_any_script(visit: Open, tmp_path: Path) -> None:
    texts = ("一只狗坐在草地上", "the man's hat, a hat", "")
    cards = [Card(image_id=f"{n}.jpg", image=thumbnail(), texts=[Text.of(texts[n])]) for n in range(3)]
    write_page(Page(title="Words", cards=cards), str(tmp_path / "out.html"))
    page = visit(tmp_path / "out.html")
    assert page.tab.locator(".about").all_inner_texts() == ["0.jpg\n8 words", "1.jpg\n5 words", "2.jpg"]


def test_an_image_that_failed_is_marked_as_wrong_though_a_person_has_described_it(visit: Open, tmp_path: Path) -> None:
    row = {"image_id": "a.jpg", "key": 1, "reason": "corrupt", "detail": "cut"}
    cards = [caption_card(row, thumbnail(), ["what a person sees"]), card(0)]
    write_page(Page(title="References", cards=cards), str(tmp_path / "out.html"))
    page = visit(tmp_path / "out.html")
    assert page.tab.get_attribute("#tags button[value=corrupt]", "class") == "wrong"
    page.tab.fill("#most", "9")
    page.tab.select_option("#sort", "words")
    assert page.tab.locator(".about").all_inner_texts()[-1] == "a.jpg"


def test_enter_enlarges_the_first_image_before_anything_was_touched(visit: Open, grid: Path) -> None:
    page = visit(grid)
    page.tab.keyboard.press("Enter")
    assert page.tab.inner_text("#place") == "1 of 20"
    page.tab.keyboard.press("/")
    assert page.tab.locator("#large").is_hidden()
    page.tab.wait_for_timeout(100)  # nothing takes the focus away again
    assert page.tab.evaluate("document.activeElement.id") == "find"


def test_dark_and_light_follow_the_system_until_the_button_is_pressed(visit: Open, grid: Path) -> None:
    def luminance(page: Visit) -> int:
        colour = page.tab.evaluate("getComputedStyle(document.body).backgroundColor")
        return int(colour.removeprefix("rgb(").split(",")[0])

    light, dark = visit(grid, color_scheme="light"), visit(grid, color_scheme="dark")
    assert luminance(light) > 200
    assert luminance(dark) < 60
    dark.tab.click("#theme")
    assert luminance(dark) > 200
    dark.tab.click("#theme")
    assert luminance(dark) < 60


def test_a_phone_shows_whole_images_and_never_scrolls_sideways(visit: Open, grid: Path) -> None:
    page = visit(grid, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True, device_scale_factor=2)
    assert page.tab.evaluate("document.documentElement.scrollWidth") == 360
    image = page.tab.locator(".frame img").first
    box = image.bounding_box()
    assert box is not None
    assert box["width"] > 300
    assert page.tab.evaluate("parseFloat(getComputedStyle(document.querySelector('.text')).fontSize)") >= 16
    image.tap()
    assert page.tab.locator("#large").is_visible()
    assert page.tab.evaluate("document.getElementById('large').scrollWidth") == 360
    page.tab.locator("#after").tap()
    assert page.tab.inner_text("#place") == "2 of 20"
    page.tab.locator("#close").tap()


@pytest.mark.parametrize(("width", "height"), [(390, 844), (360, 640)])
def test_a_phone_shows_the_image_that_it_enlarges_though_much_is_said_of_it(
    visit: Open, tmp_path: Path, width: int, height: int
) -> None:
    row = {**caption_row(0, "in/000.jpg", "a brown dog"), **{f"column_{n}": n for n in range(16)}}
    write_page(Page(title="One", cards=[caption_card(row, thumbnail())]), str(tmp_path / "out.html"))
    size = {"width": width, "height": height}
    page = visit(tmp_path / "out.html", viewport=size, is_mobile=True, has_touch=True, device_scale_factor=2)
    page.tab.locator(".frame").tap()
    assert page.tab.evaluate("document.getElementById('large').scrollHeight") > height
    assert page.tab.evaluate("document.getElementById('large').scrollTop") == 0
    assert page.tab.evaluate("document.activeElement.id") == "large-about"


def test_images_are_decoded_and_keep_their_shape(visit: Open, grid: Path) -> None:
    page = visit(grid)
    page.wait_until("document.querySelector('.frame img').naturalWidth > 0")
    box = page.tab.locator(".frame img").first.bounding_box()
    assert box is not None
    assert box["width"] / box["height"] == pytest.approx(48 / 40, rel=0.01)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty cards of a table, with long captions, names, scores and every chip that there is."""
    path = tmp_path_factory.mktemp("photos") / "out.html"
    reasons = ("corrupt", "empty", "not_an_image", "forbidden", "too_many_pixels")
    cards = []
    for n in range(60):
        row = caption_row(
            n, f"in/{n:03d}-a_rather_long_name_of_a_file.jpg", "a brown dog beside a lake, " * (1 + n % 3)
        )
        why = ("low clip_score", "low min_logprob, truncated", "low mean_logprob, repetitive", "")[n % 4]
        row |= {"clip_score": n / 60, "finish_reason": ("stop", "length")[n % 3 == 0], "why": why}
        failed = {"image_id": row["image_id"], "key": n, "reason": reasons[n // 12], "detail": "what was seen"}
        image = Thumbnail(encoded("WEBP", n, (80, 60)), 80, 60)
        cards.append(caption_card(failed if n % 12 == 5 else row, image, path=f"/data/in/{n:03d}.jpg"))
    page = Page(title="Photos", cards=cards, lines=["One line.", "Another."], scores=["clip_score", "mean_logprob"])
    write_page(page, str(path))
    return path


def num_above_the_fold(page: Visit) -> int:
    """How many images are whole on the screen before it is scrolled."""
    return int(
        page.tab.evaluate(
            "[...document.querySelectorAll('.card:not([hidden]) .frame')]"
            ".filter((frame) => frame.getBoundingClientRect().bottom <= innerHeight).length"
        )
    )


def test_dense_shows_at_least_twice_the_images_above_the_fold(visit: Open, photos: Path) -> None:
    for size, at_least in (((1440, 1000), 14), ((390, 844), 4), ((2560, 1440), 40)):
        page = visit(photos, viewport={"width": size[0], "height": size[1]})
        roomy = num_above_the_fold(page)
        page.tab.click("#dense")
        assert num_above_the_fold(page) >= max(2 * roomy, at_least), size
        assert page.tab.evaluate("document.documentElement.scrollWidth") == size[0]
        page.tab.keyboard.press("d")
        assert num_above_the_fold(page) == roomy


TOOLS = ("#find", "#sort", "#turn", "#fewest", "#most", "#count", "#dense", "#theme")


@pytest.mark.parametrize("width", [1000, 1440, 2560])
def test_the_tools_stand_in_one_row_whatever_is_chosen(visit: Open, photos: Path, width: int) -> None:
    page = visit(photos, viewport={"width": width, "height": 900})
    height = box(page.tab.locator("#tools"))["height"]
    page.tab.locator("#tags button").nth(2).click()
    page.tab.select_option("#sort", "fact:mean_logprob")
    page.tab.click("#turn")
    page.tab.fill("#fewest", "3")
    boxes = [box(page.tab.locator(name)) for name in TOOLS]
    middles = [one["y"] + one["height"] / 2 for one in boxes]
    assert max(middles) - min(middles) < 4
    for left, right in itertools.pairwise(boxes):
        assert left["x"] + left["width"] <= right["x"] + 16
    assert boxes[-1]["x"] + boxes[-1]["width"] <= width
    assert box(page.tab.locator("#tools"))["height"] == height
    tops = {box(tag)["y"] for tag in page.tab.locator("#tags button").all()}
    assert len(tops) == 1


def test_a_phone_keeps_its_tools_in_two_rows_at_the_top_large_enough_for_a_thumb(visit: Open, photos: Path) -> None:
    page = visit(photos, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True, device_scale_factor=2)
    page.tab.locator("#tags button").nth(1).tap()
    page.tab.evaluate("scrollTo(0, 1500)")
    page.wait_until("scrollY > 1000")
    tools = box(page.tab.locator("#tools"))
    assert (tools["y"], tools["height"] < 110) == (0, True)
    targets = "[...document.querySelectorAll('#tools :is(input, select, button)')]"
    sizes = page.tab.evaluate(f"{targets}.map((e) => [e.id, e.offsetWidth, e.offsetHeight])")
    assert [found for found in sizes if found[1] < 40 or found[2] < 40] == []
    assert len({box(page.tab.locator(name))["y"] for name in ("#find", "#dense", "#theme")}) == 1
    assert page.tab.evaluate("document.documentElement.scrollWidth") == 390
    page.tab.locator(".card:not([hidden]) .frame").nth(5).tap()
    buttons = "[...document.querySelectorAll('#large button')].map((e) => Math.min(e.offsetWidth, e.offsetHeight))"
    assert min(page.tab.evaluate(buttons)) >= 40


def test_what_is_chosen_stands_in_the_address_and_is_chosen_again_from_it(visit: Open, grid: Path) -> None:
    page = visit(grid)
    page.tab.fill("#find", "café near")
    page.tab.select_option("#sort", "fact:mean_logprob")
    page.tab.click("#turn")
    page.tab.fill("#most", "20")
    page.tab.click("#tags button[value=length]")
    page.tab.click("#dense")
    chosen = page.numbers()
    fragment = page.tab.url.partition("#")[2]
    assert fragment == "find=caf%C3%A9+near&sort=fact%3Amean_logprob&turned=yes&most=20&only=length&view=dense"
    again = visit(grid, fragment=fragment)
    assert again.numbers() == chosen != []
    assert again.tab.url == page.tab.url
    assert again.tab.evaluate("document.body.className") == "dense"
    again.tab.evaluate("location.hash = 'only=corrupt'")
    again.wait_until("!document.body.classList.contains('dense')")
    assert again.numbers() == [19, 14, 9, 4]
    again.tab.click("#tags button[value=corrupt]")
    assert again.tab.url == grid.as_uri()
    again.tab.focus(".skip")
    again.tab.keyboard.press("Enter")
    assert again.tab.evaluate("document.activeElement.id") == "cards"
    assert len(again.numbers()) == 20


def test_an_address_that_asks_for_what_is_not_there_shows_everything_and_runs_nothing(visit: Open, grid: Path) -> None:
    hostile = "sort=fact%3A__proto__&only=%3Cscript%3E&fewest=x&turned=maybe&view=%22%3E%3Cimg+src%3Dx%3E&cards"
    page = visit(grid, fragment=hostile)
    assert len(page.numbers()) == 20
    assert page.tab.url == grid.as_uri()


@pytest.fixture
def copying(visit: Open, photos: Path) -> Visit:
    """A page whose first image is enlarged, that may use the clipboard, and whose clock only the test moves."""
    page = visit(photos, permissions=["clipboard-read", "clipboard-write"])
    page.tab.clock.install(time=0)
    page.tab.clock.pause_at(1)
    page.tab.locator(".frame").first.click()
    return page


def test_id_and_path_of_an_image_are_copied(copying: Visit) -> None:
    for what, copied in (("Id", "in/000-a_rather_long_name_of_a_file.jpg"), ("Path", "/data/in/000.jpg")):
        copying.tab.click(f"#copy-{what.lower()}")
        copying.wait_until(f"document.getElementById('copied').value === '{what} copied'")
        assert copying.tab.evaluate("navigator.clipboard.readText()") == copied
    assert "/data/in/000.jpg" in copying.tab.inner_text("#large-facts")
    copying.tab.keyboard.press("Escape")
    copying.tab.keyboard.press("ArrowRight")
    copying.tab.keyboard.press("c")
    copying.wait_until("document.getElementById('said').value === 'Id copied'")
    assert copying.tab.evaluate("navigator.clipboard.readText()") == "in/001-a_rather_long_name_of_a_file.jpg"


def test_what_is_said_of_a_copy_stays_three_seconds_whatever_was_copied_before(copying: Visit) -> None:
    said = "document.getElementById('copied').value"
    copying.tab.click("#copy-id")
    copying.wait_until(f"{said} === 'Id copied'")
    copying.tab.clock.run_for(2_900)
    copying.tab.click("#copy-path")
    copying.wait_until(f"{said} === 'Path copied'")
    copying.tab.clock.run_for(2_900)
    assert copying.tab.evaluate(said) == "Path copied"
    copying.tab.clock.run_for(200)
    assert copying.tab.evaluate(said) == ""


def test_what_is_said_of_a_copy_on_the_page_goes_though_another_follows_in_the_large_view(copying: Visit) -> None:
    copying.tab.keyboard.press("Escape")
    copying.tab.keyboard.press("c")
    copying.wait_until("document.getElementById('said').value === 'Id copied'")
    copying.tab.keyboard.press("Enter")
    copying.tab.click("#copy-path")
    copying.wait_until("document.getElementById('copied').value === 'Path copied'")
    copying.tab.clock.run_for(3_100)
    assert copying.tab.evaluate("document.getElementById('said').value") == ""


def test_a_page_without_the_clipboard_of_a_safe_origin_copies_all_the_same(copying: Visit) -> None:
    copying.tab.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('refused')); }")
    copying.tab.click("#copy-path")
    copying.wait_until("document.getElementById('copied').value === 'Path copied'")
    assert copying.tab.evaluate("navigator.clipboard.readText()") == "/data/in/000.jpg"


def test_chips_on_the_cards_are_words(visit: Open, photos: Path) -> None:
    page = visit(photos)
    chips = set(page.tab.locator(".card .chip").all_text_contents())
    assert chips == {"complete", "cut off", "poor match", "unsure", "one unsure word", "repetitive"}
    assert page.tab.locator("#tags button").first.inner_text().split("\n")[0] not in ("stop", "length")


HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    "</script x=1 ",
    "<img src=x onerror='window.pwned = 1'>",
    '"><svg onload=window.pwned=1>',
    "<!--<script>",
    "]]>--></style></title><base href=//example.org/>",
    "{{data}} {{script}} $& $1 \\u003c \\",
    "javascript:window.pwned=1",
    "line\u2028and\u2029paragraph",
    "&lt;b&gt; &amp; &#x3c;",
    "\u202eright to left\u202c",
    "nul \x00 and bell \x07",
)


def test_no_caption_name_column_or_title_can_run_or_disturb_the_page(visit: Open, tmp_path: Path) -> None:
    texts = [*HOSTILE, "half a pair \ud83d alone"]
    cards = [
        Card(
            image_id=text,
            image=Reject(RejectReason.CORRUPT, text) if number % 2 else thumbnail(),
            texts=[Text.of(text, label=text)],
            path=text,
            facts={text: text, "__proto__": text, "constructor": 1.0},
            tags=[text, "__proto__"],
        )
        for number, text in enumerate(texts)
    ]
    path = tmp_path / "out.html"
    write_page(Page(title=" ".join(HOSTILE), cards=cards, lines=texts, scores=HOSTILE[:3]), str(path))
    page = visit(path)
    expected = [text.replace("\ud83d", "\\ud83d") for text in texts]
    assert page.tab.evaluate("[...document.querySelectorAll('.texts .text')].map((e) => e.lastChild.data)") == expected
    for _ in cards:
        page.tab.keyboard.press("Enter")
        page.tab.keyboard.press("Escape")
        page.tab.keyboard.press("ArrowRight")
    page.tab.fill("#find", "<script>")
    page.tab.select_option("#sort", "name")
    assert page.tab.evaluate("window.pwned") is None
    assert page.tab.evaluate("document.scripts.length") == 2
    assert (
        page.tab.evaluate("document.querySelectorAll('svg, base, iframe, [onerror], [onload], [style*=x]').length") == 0
    )


def test_the_policy_of_the_page_lets_nothing_run_load_or_leave(visit: Open, grid: Path) -> None:
    page = visit(grid)
    with pytest.raises(Error, match="TrustedHTML"):
        page.tab.evaluate("document.body.innerHTML = '<img src=x onerror=window.pwned=1>'")
    page.tab.evaluate(
        """() => {
            window.blocked = [];
            const note = (event) => window.blocked.push(event.effectiveDirective);
            document.addEventListener("securitypolicyviolation", note);
            const image = new Image();
            image.src = "https://example.org/x.png";
            const style = document.createElement("style");
            style.textContent = "body { display: none }";
            document.body.append(image, style);
            return fetch("https://example.org/").catch(() => null);
        }"""
    )
    page.wait_until("window.blocked.length >= 3")
    blocked = set(page.tab.evaluate("window.blocked"))
    assert [url for url in page.answers if url.startswith("http")] == []
    assert {"img-src", "style-src-elem", "connect-src"} <= blocked
    page.complaints.clear()  # they were ours
    page.requests.clear()


def test_the_page_asks_the_network_for_nothing_and_needs_one_file(visit: Open, grid: Path) -> None:
    page = visit(grid)
    page.tab.keyboard.press("End")
    page.wait_until("[...document.images].every((image) => image.naturalWidth > 0)")
    assert [url for url in page.requests if not url.startswith("data:")] == [grid.as_uri()]


def test_two_runs_stand_side_by_side_with_differences_marked_visibly_and_for_screen_readers(
    visit: Open, tmp_path: Path
) -> None:
    before = caption_row(0, "in/000.jpg", "a red dog on a hill")
    after = {**before, "caption": "a dog on a green hill"}
    failed = {"image_id": "in/001.jpg", "key": 1, "reason": "missing", "detail": "HTTP 404"}
    labels = ("one", "two")
    cards = [pair_card((before, after), labels, thumbnail(), 0.3), pair_card((failed, after), labels, thumbnail(), 1.0)]
    path = tmp_path / "out.html"
    write_page(Page(title="one and two", cards=cards, layout="pairs", scores=["change"]), str(path))
    page = visit(path)
    first = page.tab.locator(".card").first
    assert first.locator("del").all_text_contents() == ["[removed: red]"]
    assert first.locator("ins").all_text_contents() == ["[added: green]"]
    left, right = (text.bounding_box() for text in first.locator(".text").all())
    assert left is not None
    assert right is not None
    assert (left["y"], left["x"] + left["width"] < right["x"]) == (right["y"], True)
    lines = "[...document.querySelectorAll('del, ins')].map((e) => getComputedStyle(e).textDecorationLine)"
    assert page.tab.evaluate(lines) == ["line-through", "underline"]
    assert page.tab.locator(".missing").all_inner_texts() == ["one\nmissing: HTTP 404"]


@pytest.mark.slow
def test_five_hundred_images_stay_below_fifteen_megabytes_and_scroll(visit: Open, tmp_path: Path) -> None:
    """Frame times are printed, not asserted."""
    images = tmp_path / "images"
    images.mkdir()
    for seed in range(500):
        (images / f"{seed:03d}.jpg").write_bytes(encoded(seed=seed, size=(800, 600), quality=90))
    table, _ = begin_table(str(tmp_path / "captions"), str(images))
    add_part(table, [caption_row(n, f"{images}/{n:03d}.jpg", f"a picture numbered {n}") for n in range(500)])
    output = tmp_path / "out.html"
    summary = gallery(GalleryConfig(table=str(table.location), output=str(output), sample=500))
    assert (summary["pictures"], summary["size_bytes"]) == (500, output.stat().st_size)
    assert summary["size_bytes"] < 15_000_000
    page = visit(output)
    frames = page.tab.evaluate(
        """async () => {
            const times = [];
            for (let last = performance.now(), y = 0; y < document.body.scrollHeight - innerHeight; y += 120) {
                scrollTo(0, y);
                const now = await new Promise(requestAnimationFrame);
                times.push(now - last);
                last = now;
            }
            return times.sort((a, b) => a - b);
        }"""
    )
    print(f"size={summary['size_bytes']} frames={len(frames)} median_ms={frames[len(frames) // 2]:.1f}", end=" ")
    print(f"p99_ms={frames[int(len(frames) * 0.99)]:.1f} max_ms={frames[-1]:.1f}")
    page.tab.evaluate("scrollTo(0, 0)")
    page.tab.keyboard.press("End")
    page.wait_until("[...document.querySelectorAll('.card')].pop().contains(document.activeElement)")
    page.wait_until("document.activeElement.querySelector('img')?.naturalWidth > 0")
