/**
 * The address bar as the state of the page: which view, and everything that a view wants to be found again.
 *
 * A view reads `route.value.query` and writes it with `setQuery`; it keeps nothing else that somebody who is sent the
 * address would miss.
 */
import { signal } from "@preact/signals";

const BASE = "/page";

/** `{path: ["jobs", ID], query: {...}}`: the parts of the path under `/page`, decoded, and the query as an object. A name
 * that occurs several times has an array as its value. */
export const route = signal(read());

function read() {
  const path = location.pathname.slice(BASE.length).split("/").filter(Boolean).map(decodeURIComponent);
  const given = new URLSearchParams(location.search);
  const query = {};
  for (const name of new Set(given.keys())) {
    const values = given.getAll(name);
    query[name] = values.length > 1 ? values : values[0];
  }
  return { path, query };
}

/** The query string of an object, without what is null, false or empty; an array repeats its name. */
export function queryString(query = {}) {
  const written = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== undefined && one !== null && one !== "" && one !== false) written.append(name, one);
    }
  }
  // Commas, colons and @ may stand in a query, and are easier to read there.
  const text = written.toString().replace(/%2C/g, ",").replace(/%3A/g, ":").replace(/%40/g, "@");
  return text ? `?${text}` : "";
}

/** The address of a view: `href(["jobs", id], {quarter: 50})`. */
export function href(path, query) {
  return `${[BASE, ...path.map(encodeURIComponent)].join("/")}${queryString(query)}`;
}

/** Go to an address of the page. `replace`: without an entry in the history. */
export function navigate(to, { replace = false } = {}) {
  if (to === location.pathname + location.search) return;
  history[replace ? "replaceState" : "pushState"](null, "", to);
  const before = route.value.path.join("/");
  route.value = read();
  if (route.value.path.join("/") !== before) scrollTo(0, 0);
}

/** Change some names of the query, the others staying as they are; null removes one. Without an entry in the history,
 * unless `push`. */
export function setQuery(changes, { push = false } = {}) {
  const { path, query } = route.value;
  navigate(href(path, { ...query, ...changes }), { replace: !push });
}

/** A name of the query as an array. */
export function queryList(name) {
  const value = route.value.query[name];
  return value === undefined ? [] : Array.isArray(value) ? value : [value];
}

addEventListener("popstate", () => {
  route.value = read();
});

// Links of the page need no load; with a modifier key, or for another window, the browser does what it always does.
addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href]");
  if (!link || event.defaultPrevented || event.button !== 0) return;
  if (event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
  if (link.target || link.hasAttribute("download") || link.origin !== location.origin) return;
  if (link.pathname !== BASE && !link.pathname.startsWith(`${BASE}/`)) return;
  if (link.hash && link.pathname === location.pathname && link.search === location.search) return;
  event.preventDefault();
  navigate(link.pathname + link.search);
});
