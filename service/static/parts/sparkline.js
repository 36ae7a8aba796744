/** A loss curve as small as a word. */
import { html } from "htm/preact";

const [WIDTH, HEIGHT] = [96, 22];

/** `curve`: `{low, high}`, the extremes of equal stretches; drawn on a logarithmic scale, as losses fall by factors. */
export function Sparkline({ curve, label }) {
  const n = curve?.low.length ?? 0;
  if (!n) return html`<svg class="spark" width=${WIDTH} height=${HEIGHT} aria-hidden="true"></svg>`;
  const log = (value) => (value > 0 ? Math.log(value) : null);
  const [low, high] = [curve.low.map(log), curve.high.map(log)];
  const shown = [...low, ...high].filter((value) => value !== null);
  const [bottom, top] = [Math.min(...shown), Math.max(...shown)];
  const x = (i) => (n === 1 ? 0 : (i / (n - 1)) * (WIDTH - 2)) + 1;
  const y = (value) => HEIGHT - 2 - ((value - bottom) / (top - bottom || 1)) * (HEIGHT - 4);
  const points = (values) => values.map((value, i) => (value === null ? null : `${x(i).toFixed(1)},${y(value).toFixed(1)}`)).filter(Boolean);
  const middle = low.map((value, i) => (value === null || high[i] === null ? null : (value + high[i]) / 2));
  return html`<svg class="spark" width=${WIDTH} height=${HEIGHT} viewBox=${`0 0 ${WIDTH} ${HEIGHT}`} role="img" aria-label=${label}>
    <polygon points=${[...points(low), ...points(high).reverse()].join(" ")} />
    <polyline points=${points(n === 1 ? [high[0], low[0]] : middle).join(" ")} />
  </svg>`;
}
