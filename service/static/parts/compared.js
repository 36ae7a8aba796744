/** The rows of a comparison: jobs, or groups of jobs that differ only in their seed, with their figures. Draws nothing. */
import { knobValue } from "../format.js";

/** Mean and extremes of some figures; null where there is none. `std` is null for a single one. */
export function spreadOf(figures) {
  const known = figures.filter((value) => value !== null && value !== undefined);
  const n = known.length;
  if (!n) return null;
  const mean = known.reduce((sum, value) => sum + value / n, 0);
  const std = n > 1 ? Math.sqrt(known.reduce((sum, value) => sum + (value - mean) ** 2 / (n - 1), 0)) : null;
  return { n, mean, std, min: Math.min(...known), max: Math.max(...known) };
}

/** A value of what differs, in short: of a text the beginning of its digest. */
export function valueText(value) {
  if (typeof value === "string") return value.length === 64 ? value.slice(0, 8) : value;
  // 0.1 + 0.2, and steps of a grid that somebody computed: five digits tell them apart.
  return knobValue(typeof value === "number" && !Number.isInteger(value) ? Number(value.toPrecision(5)) : value);
}

/** What sets a row apart, in words: `lr=1e-4, n_embd=64`. */
export const labelOf = (values) =>
  Object.entries(values).map(([name, value]) => `${name}=${valueText(value)}`).join(", ");

/** A job's name, or the beginning of its id. */
export const nameOf = (job) => job.name ?? job.job_id.slice(0, 13);

/** Whether some groups have several jobs, so that a mean says more than each of them. */
export const hasSeeds = (comparison) => comparison.groups.some((group) => group.job_ids.length > 1);

/** `[{key, label, values, jobs}]`, one for each group, or for each job. */
export function rowsOf(comparison, isGrouped) {
  if (!isGrouped) {
    return comparison.jobs.map((job) => ({
      key: job.job_id, label: labelOf(job.values) || nameOf(job), values: job.values, jobs: [job],
    }));
  }
  const byId = new Map(comparison.jobs.map((job) => [job.job_id, job]));
  return comparison.groups.map((group) => {
    const jobs = group.job_ids.map((id) => byId.get(id));
    return { key: group.job_ids[0], label: labelOf(group.values) || nameOf(jobs[0]), values: group.values, jobs };
  });
}

/** The newest quarter that one of some jobs has, in percent; null where none has any. */
export function newestOf(jobs) {
  const percents = jobs.flatMap(({ quarters }) => quarters.map(({ percent }) => percent));
  return percents.length ? Math.max(...percents) : null;
}

/** The quarter whose figures of some jobs are shown, in percent, and how many of them have come to it: `{percent, n}`. */
export function reachedBy(jobs, quarter) {
  const percent = quarter === "last" || quarter === "best" ? newestOf(jobs) : Number(quarter);
  return { percent, n: jobs.filter(({ quarters }) => quarters.some((one) => one.percent === percent)).length };
}

/**
 * The figures of jobs that belong together: at a percent, at their newest quarter (`last`), or the best until then (`best`).
 * Null for a job that has not come to that quarter: a mean over different quarters says nothing.
 */
export function figuresOf(jobs, metric, quarter, isLargerBetter = false) {
  const { percent: wanted } = reachedBy(jobs, quarter);
  const best = isLargerBetter ? Math.max : Math.min;
  return jobs.map(({ quarters }) => {
    const its = quarters.find(({ percent }) => percent === wanted);
    if (!its || quarter !== "best") return its?.metrics[metric] ?? null;
    const known = quarters.map(({ metrics }) => metrics[metric]).filter((value) => value !== null);
    return known.length ? best(...known) : null;
  });
}

/** A row's figure over its jobs. */
export const rowFigure = (row, metric, quarter, isLargerBetter) => spreadOf(figuresOf(row.jobs, metric, quarter, isLargerBetter));

/** Values in their natural order: numbers by size, everything else as it came. */
export const inOrder = (values) =>
  values.every((value) => typeof value === "number") ? [...values].sort((a, b) => a - b) : values;

/** Names of colours for rows: one for each where eight are enough, else one for each value of the first parameter that has
 * at most eight. */
export function colorsOf(rows, parameters) {
  if (rows.length <= 8) return rows.map((_, index) => `series-${index}`);
  const by = parameters.find(({ name, values }) => name !== "seed" && values.length <= 8);
  if (!by) return rows.map(() => "series-0");
  const order = inOrder(by.values).map((value) => JSON.stringify(value));
  return rows.map((row) => `series-${order.indexOf(JSON.stringify(row.values[by.name]))}`);
}
