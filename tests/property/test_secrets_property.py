"""A secret in a URL, wherever it stands, is in nothing that is shown."""

from collections.abc import Callable
from urllib.parse import quote

from hypothesis import given
from hypothesis import strategies as st

from captioner.errors import BundleError
from captioner.model.folder import open_folder
from captioner.schema import Reject, RejectReason
from captioner.storage import Location, open_store, redact
from captioner.storage.faults import diagnose
from tests.hypothesis_profiles import max_examples

SECRET = "S3CRET"
NAMES = ["X-Amz-Signature", "X-Amz-Credential", "sig", "token", "jwt", "hmac", "code", "mysign", "auth", "pass"]
NAMES += ["session", "subscription-key", "sas", "key"]
PART = st.text("ab@/!$*+,-._~", max_size=4).filter(lambda text: "//" not in text)
AROUND = st.tuples(PART, PART) | st.sampled_from(
    [("a://", ""), ("://", "/b@"), ("", "://b"), ("a/", "://b"), ("70000/", ""), ("123456/a@", "")]
)


def encoded(name: str) -> str:
    return "".join(f"%{ord(letter):02X}" for letter in name)


@st.composite
def urls_with_secrets(draw: Callable[..., str]) -> str:
    url = f"{draw(st.sampled_from(['https', 'http', 'ftp']))}://host.example/folder/a.jpg"
    match draw(st.sampled_from(["login", "user", "parameter"])):
        case "login":
            before, after = draw(AROUND)
            url = url.replace("://", f"://me:{before}{SECRET}{after}@")
        case "user":
            url = url.replace("://", f"://{SECRET}@")
        case _:
            name = draw(st.sampled_from(NAMES))
            name = encoded(name) if draw(st.booleans()) else name
            url += f"?{draw(st.sampled_from(['', 'n=1&', 'n=1;', 'u=b?']))}{name}={SECRET}"
            for _ in range(draw(st.integers(0, 2))):
                url = f"https://proxy.example/get?u={quote(url, safe='')}"
    return draw(st.sampled_from(["", "zip://::", "zip://a/b.jpg::simplecache::", "filecache::"])) + url


@max_examples(500)
@given(
    urls_with_secrets(),
    st.sampled_from(
        ["{}", "404 for {}", "simplecache::{}", "'{}'", "x={}", '{{"url": "{}"}}', "https://h {} https://i"]
    ),
)
def test_a_secret_is_in_nothing_that_is_shown(url: str, text: str) -> None:
    assert SECRET not in redact(text.format(url))
    place = Location(url)
    shown = [str(place), repr(place), place.name, str(place / "x.json"), str(place.parent), repr(open_store("/x"))]
    fault = diagnose(OSError(text.format(url)))
    assert not any(SECRET in what for what in [*shown, fault.detail, repr(Reject(RejectReason.MISSING, fault.detail))])


@max_examples(100)
@given(urls_with_secrets())
def test_a_model_whose_address_holds_a_secret_is_refused_without_it(url: str) -> None:
    scheme = "nosuchstore"  # refused before anything is asked
    try:
        open_folder(url.replace("https", scheme).replace("http", scheme).replace("ftp", scheme))
    except BundleError as error:
        assert SECRET not in str(error)  # noqa: PT017
