"""Looks at a job again and again, in a process of its own that loads nothing but a client."""

import multiprocessing
import time
from multiprocessing.synchronize import Event
from typing import Any

import httpx


def look(url: str, job_id: str, over: Event, said: "multiprocessing.Queue[Any]") -> None:
    """In a process of its own, so that the clients' own work delays nothing: `GET /jobs/{id}` twenty times a second."""
    taken = []
    with httpx.Client(base_url=url, timeout=30) as http:
        http.get(f"/jobs/{job_id}")
        said.put(None)
        while not over.wait(0.05):
            began = time.perf_counter()
            http.get(f"/jobs/{job_id}").raise_for_status()
            taken.append(time.perf_counter() - began)
    said.put(taken)
