/** The views: the first word of an address under `/page`, the module that shows it, and the texts it needs. */

import { loadTexts } from "./i18n.js";

/** Name -> `load` of the module, whose default export is the view; `texts`: parts of i18n; `inMenu`: has a menu entry;
 * `changes`: is of no use to one who may only read. */
export const VIEWS = {
  jobs: { load: () => import("./views/jobs.js"), texts: ["jobs"], inMenu: true },
  job: { load: () => import("./views/job.js"), texts: ["job"] },
  new: { load: () => import("./views/new_job.js"), texts: ["new"], inMenu: true, changes: true },
  sweeps: { load: () => import("./views/sweeps.js"), texts: ["sweeps"], inMenu: true },
  sweep: { load: () => import("./views/sweep.js"), texts: ["sweeps", "compare"] },
  compare: { load: () => import("./views/compare.js"), texts: ["compare"] },
  generate: { load: () => import("./views/generate.js"), texts: ["generate"], inMenu: true },
  learn: { load: () => import("./views/learn.js"), texts: ["learn", "sweeps", "compare", "generate"], inMenu: true },
};

const loaded = new Map();

/** The component of a view, its module and its texts loaded once. */
export function loadView(name) {
  const { load, texts } = VIEWS[name];
  if (!loaded.has(name)) {
    const both = Promise.all([load(), loadTexts(...texts)]).then(([module]) => module.default);
    both.catch(() => loaded.delete(name));
    loaded.set(name, both);
  }
  return loaded.get(name);
}

/** The view's name of a path: `/page/jobs/ID` is `job`, `/page` is `jobs`. */
export function viewOf(path) {
  if (!path.length) return "jobs";
  const detail = { jobs: "job", sweeps: "sweep" }[path[0]];
  return path.length > 1 && detail ? detail : path[0];
}
