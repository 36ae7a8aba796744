"""Polls a job over HTTP from a process of its own that imports only httpx, and measures how long each answer takes."""

import multiprocessing
import time
from multiprocessing.synchronize import Event
from typing import Any

import httpx


def poll(url: str, job_id: str, over: Event, results: "multiprocessing.Queue[Any]") -> None:
    """Send `GET /jobs/{id}` twenty times a second until `over` is set.

    Runs in a process of its own, so that the other clients' work delays nothing. Puts None into `results` once the
    first request is answered, and at the end the list of the seconds that each answer took.
    """
    taken = []
    with httpx.Client(base_url=url, timeout=30) as http:
        http.get(f"/jobs/{job_id}")
        results.put(None)
        while not over.wait(0.05):
            began = time.perf_counter()
            http.get(f"/jobs/{job_id}").raise_for_status()
            taken.append(time.perf_counter() - began)
    results.put(taken)
