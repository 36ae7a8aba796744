"""Signing a browser in and out."""

import httpx
import pytest

from service.access import keys
from service.access.keys import create_key, revoke_key
from service.access.quotas import Quotas
from tests.api import TEXT, Api, Serve
from tests.databases import Clock


@pytest.fixture
def api(serve: Serve) -> Api:
    return serve()


def test_a_browser_signs_in_works_and_signs_out(api: Api) -> None:
    made = create_key(api.db, "ana", "member", quotas=Quotas(queued_jobs=5))
    assert api.http.get("/session").json() == {"key_required": True, "owner": None, "role": None, "quotas": []}
    answer = api.http.post("/session", json={"key": made.key}, headers={"Origin": api.url})
    assert (answer.json()["owner"], answer.json()["role"]) == ("ana", "member")
    cookie = answer.headers["set-cookie"].lower()
    assert {"httponly", "samesite=strict", "path=/", f"max-age={keys.SIGN_IN_SECONDS}"} <= set(cookie.split("; "))
    assert "secure" not in cookie
    assert made.key not in answer.text + answer.headers["set-cookie"]
    assert api.submit()["id"]
    asked = api.http.get("/session").json()
    assert asked["quotas"] == [{"name": "queued_jobs", "limit": 5, "used": 1, "left": 4}]
    token = api.http.cookies["nanomoe_session"]
    assert api.http.delete("/session").status_code == 204
    assert "nanomoe_session" not in api.http.cookies
    again = api.http.get("/jobs", headers={"Cookie": f"nanomoe_session={token}"})
    assert (again.status_code, again.json()["code"]) == (401, "key_required")


def test_the_cookie_of_a_page_under_tls_is_sent_under_tls_only(api: Api) -> None:
    made = create_key(api.db, "ana", "member")
    for headers in (
        {"Origin": api.url.replace("http:", "https:")},
        {"X-Forwarded-Proto": "https"},
    ):
        answer = api.http.post("/session", json={"key": made.key}, headers=headers)
        assert "secure" in answer.headers["set-cookie"].lower().split("; ")


def test_a_foreign_page_can_neither_sign_in_nor_use_a_sign_in(api: Api) -> None:
    made = create_key(api.db, "ana", "member")
    foreign = {"Origin": "http://evil.example"}
    assert api.http.post("/session", json={"key": made.key}, headers=foreign).json()["code"] == "origin_not_allowed"
    api.http.post("/session", json={"key": made.key})
    for headers in (foreign, {"Sec-Fetch-Site": "same-site"}):
        answer = api.http.post("/jobs", json={"text": TEXT}, headers=headers)
        assert answer.json()["code"] == "origin_not_allowed"


def test_a_revoked_key_ends_its_sign_ins(api: Api) -> None:
    made = create_key(api.db, "ana", "member")
    api.http.post("/session", json={"key": made.key})
    assert api.http.get("/jobs").status_code == 200
    revoke_key(api.db, made.id)
    assert api.http.get("/jobs").json()["code"] == "key_required"


def test_of_too_many_sign_ins_with_a_key_the_first_ends(api: Api) -> None:
    ana, rui = (create_key(api.db, owner, "member").key for owner in ("ana", "rui"))

    def sign_in(key: str) -> str:
        with httpx.Client(base_url=api.url) as browser:
            assert browser.post("/session", json={"key": key}).status_code == 200
            return browser.cookies["nanomoe_session"]

    tokens = [sign_in(ana), sign_in(rui), *(sign_in(ana) for _ in range(keys.MOST_SIGN_INS))]
    known = [keys.identify_session(api.db, token) is not None for token in tokens]
    assert known == [False] + [True] * (keys.MOST_SIGN_INS + 1)


def test_a_sign_in_ends_after_its_time(api: Api) -> None:
    made = create_key(api.db, "ana", "member")
    clock = Clock(api.db)
    api.http.post("/session", json={"key": made.key})
    assert api.http.get("/jobs").status_code == 200
    clock.advance(keys.SIGN_IN_SECONDS + 1)
    assert api.http.get("/jobs").json()["code"] == "key_required"


def test_a_key_in_the_header_goes_before_the_cookie(api: Api) -> None:
    ana, rui = (create_key(api.db, owner, "member").key for owner in ("ana", "rui"))
    api.http.post("/session", json={"key": ana})
    assert api.http.get("/session", headers={"Authorization": f"Bearer {rui}"}).json()["owner"] == "rui"
    assert api.http.get("/jobs", headers={"Authorization": "Bearer wrong"}).status_code == 401


@pytest.mark.parametrize("cookie", ["nanomoe_session=", "nanomoe_session=x", "nanomoe_session", "a=b; ;=", 'n="\\x'])
def test_a_cookie_that_is_no_sign_in_is_none(api: Api, cookie: str) -> None:
    create_key(api.db, "ana", "member")
    answer = httpx.get(f"{api.url}/jobs", headers={"Cookie": cookie})
    assert (answer.status_code, answer.json()["code"]) == (401, "key_required")


def test_where_no_key_was_made_there_is_nothing_to_sign_in_with(api: Api) -> None:
    answer = api.http.post("/session", json={"key": "nmk_x"})
    assert (answer.status_code, answer.json()["code"]) == (409, "no_keys")


@pytest.mark.parametrize("other", ['prefs={"a": 1}', "a b=c d", "flag", "x[0]=1", "nanomoe_session"])
def test_cookies_of_other_programs_on_the_host_end_no_sign_in(api: Api, other: str) -> None:
    made = create_key(api.db, "ana", "member")
    token = api.http.post("/session", json={"key": made.key}).cookies["nanomoe_session"]
    assert httpx.get(f"{api.url}/jobs", headers={"Cookie": f"{other}; nanomoe_session={token}"}).status_code == 200
