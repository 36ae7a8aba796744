/**
 * Envelopes of `GET /compare/series` as curves: the middle of each bucket, alone or as the mean over several jobs.
 *
 * Buckets are a power of two of steps long, so that two jobs of different lengths have buckets that fit each other.
 */

const middle = (low, high) => (low === null || high === null ? null : (low + high) / 2);

/** `{x, low, y, high}` of a job's envelope: x is a bucket's last step. */
export function curveOf({ bucket_steps: width, last_step: last, low, high }) {
  return {
    x: low.map((_, bucket) => Math.min((bucket + 1) * width, last)),
    y: low.map((value, bucket) => middle(value, high[bucket])),
    low,
    high,
  };
}

/** An envelope in buckets of `width` steps, as long as its own or longer. */
export function widened(envelope, width) {
  let { bucket_steps: own, low, high } = envelope;
  const pairs = (values, choose) =>
    Array.from({ length: Math.ceil(values.length / 2) }, (_, i) => {
      const known = values.slice(2 * i, 2 * i + 2).filter((value) => value !== null);
      return known.length ? choose(...known) : null;
    });
  for (; own < width; own *= 2) [low, high] = [pairs(low, Math.min), pairs(high, Math.max)];
  return { ...envelope, bucket_steps: own, low, high };
}

/**
 * The mean over several jobs, at each step of those that have come so far; it ends where the first of the `isWhole` ones
 * ends, so that none of them drops out of it. `low` and `high` are the smallest and the largest of any job.
 */
export function meanOf(envelopes) {
  const begun = envelopes.filter(({ low }) => low.length);
  if (begun.length < 2) return curveOf(begun[0] ?? { bucket_steps: 1, last_step: 0, low: [], high: [] });
  const width = Math.max(...begun.map((one) => one.bucket_steps));
  const curves = begun.map((one) => curveOf(widened(one, width)));
  const whole = curves.filter((_, index) => begun[index].isWhole);
  const { x } = whole.length
    ? whole.reduce((a, b) => (a.x.length <= b.x.length ? a : b))
    : curves.reduce((a, b) => (a.x.length >= b.x.length ? a : b));
  const found = { x, y: [], low: [], high: [] };
  for (let bucket = 0; bucket < x.length; bucket++) {
    let [n, sum, low, high] = [0, 0, Infinity, -Infinity];
    for (const curve of curves) {
      const value = curve.y[bucket] ?? null;
      if (value === null) continue;
      n++;
      sum += value;
      if (curve.low[bucket] < low) low = curve.low[bucket];
      if (curve.high[bucket] > high) high = curve.high[bucket];
    }
    found.y.push(n ? sum / n : null);
    found.low.push(n ? low : null);
    found.high.push(n ? high : null);
  }
  return found;
}
