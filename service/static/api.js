/**
 * Requests to the API: JSON in and out, errors as one class, and whether the API can be reached.
 *
 * Nothing else of the page calls `fetch`, but events.js, whose answers do not end.
 */
import { signal } from "@preact/signals";
import { queryString } from "./router.js";

/** `online`, or `offline` once a request found nobody, or a service that cannot answer yet (503). */
export const connection = signal("online");

/** What the service says of the one who asks: `{key_required, role, owner, quotas}`; null until it has said anything. */
export const session = signal(null);

/** Whether a key must be given before anything can be read. */
export const lacksKey = () => Boolean(session.value?.key_required && session.value.role === null);

/** Whether the one who asks may change something; a viewer may only read. */
export const mayChange = () => session.value?.role !== "viewer";

/** A problem (RFC 9457) that the API answered. `code` is stable; `errors` has `{loc, msg}` of each fault. */
export class ApiError extends Error {
  constructor(status, problem) {
    super(problem.detail ?? problem.title ?? `HTTP ${status}`);
    this.status = status;
    this.code = problem.code ?? "unknown";
    this.errors = problem.errors ?? [];
  }
}

/** Nobody answered. */
export class Unreachable extends Error {
  constructor() {
    super("unreachable");
    this.code = "unreachable";
  }
}

/**
 * A request whose answer is still to be read. Raises ApiError and Unreachable; a request that `signal` ended raises the
 * browser's AbortError.
 */
export async function request(method, path, { query, body, headers, signal: abort } = {}) {
  const isJson = body !== undefined && !(body instanceof FormData);
  let answer;
  try {
    answer = await fetch(path + queryString(query), {
      method,
      body: isJson ? JSON.stringify(body) : body,
      headers: { ...(isJson && { "Content-Type": "application/json" }), ...headers },
      signal: abort,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    connection.value = "offline";
    throw new Unreachable();
  }
  connection.value = answer.status === 503 ? "offline" : "online";
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));
  if (answer.status === 401) session.value = { key_required: true, role: null, owner: null };
  throw new ApiError(answer.status, problem);
}

async function json(method, path, options) {
  const answer = await request(method, path, options);
  return answer.status === 204 ? null : answer.json();
}

export const get = (path, query, options) => json("GET", path, { query, ...options });
export const post = (path, body, options) => json("POST", path, { body, ...options });
export const patch = (path, body) => json("PATCH", path, { body });
export const remove = (path) => json("DELETE", path);

/** The text of an answer that is none of JSON. */
export const getText = async (path, query, options) => (await request("GET", path, { query, ...options })).text();

/** Ask who is asking; while no key was ever made, that is everybody. */
export async function readSession() {
  session.value = await get("/session");
}

/** Exchange a key for a cookie that no script can read. Raises ApiError for a wrong key. */
export const signIn = (key) => post("/session", { key });

/** Give the cookie back. */
export async function signOut() {
  await remove("/session");
  await readSession();
}
