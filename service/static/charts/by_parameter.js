/**
 * A figure over the values of a parameter: a point for each job, the mean of those with the same value, a line for each
 * value of a second parameter. Values stand at equal distances, in their order. Knows no job.
 */
import { html } from "htm/preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { figure } from "../format.js";
import { loadStyle } from "../parts/basics.js";

await loadStyle("charts");

const MOST_DOTS = 200;

const MARGIN = { left: 54, right: 14, top: 12, bottom: 40 };

/** At most about six round values between two others. */
function ticksOf(low, high, isLog) {
  if (isLog) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const part of [1, 2, 5]) {
        const value = part * 10 ** power;
        if (value >= low && value <= high) found.push(value);
      }
    }
    const [first, last] = [found[0], found[found.length - 1]];
    return found.length > 7 ? found.filter((value) => Number.isInteger(Math.log10(value)) || value === first || value === last) : found;
  }
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((part) => part * power).find((value) => value >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(n ? n * step : 0);
  return found;
}

/**
 * `values`: names of the parameter's values, in order. `lines`: `[{key, label, color, points: [[figure, ...], ...]}]`, for
 * each value the figures of its jobs. `pointed`: the key of the line that stands out, or null. `label` says in words what
 * the chart shows.
 */
export function ByParameter({ label, values, lines, xName, logY = false, height = 300, onPoint }) {
  const place = useRef();
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.round(entry.contentRect.width)));
    observer.observe(place.current);
    return () => observer.disconnect();
  }, []);
  const isShown = (value) => value !== null && (!logY || value > 0);
  const all = lines.flatMap(({ points }) => points.flat()).filter(isShown);
  const isEmpty = !all.length || !width;
  let [low, high] = [Math.min(...all), Math.max(...all)];
  if (logY) [low, high] = [low / 1.15, high * 1.15];
  else {
    const margin = (high - low || Math.abs(high) || 1) * 0.08;
    [low, high] = [low - margin, high + margin];
  }
  const scaled = (value) => (logY ? Math.log(value) : value);
  const inner = height - MARGIN.top - MARGIN.bottom;
  const y = (value) => MARGIN.top + inner * (1 - (scaled(value) - scaled(low)) / (scaled(high) - scaled(low)));
  const room = (width - MARGIN.left - MARGIN.right) / values.length;
  const x = (index) => MARGIN.left + room * (index + 0.5);
  const mean = (figures) => figures.reduce((sum, value) => sum + value, 0) / figures.length;
  const every = Math.max(1, Math.ceil((Math.max(...values.map((name) => name.length)) * 7) / Math.max(room, 1)));

  // Of many jobs the range is drawn, of few each one.
  const isMany = all.length > MOST_DOTS;
  const lineOf = ({ key, label: name, color, points }, number) => {
    // Lines stand a little beside each other, so that their points do not cover each other.
    const shift = (number - (lines.length - 1) / 2) * Math.min(6, room / (lines.length + 1));
    const known = points.map((figures) => figures.filter(isShown));
    const means = known.flatMap((figures, index) => (figures.length ? [[x(index) + shift, y(mean(figures))]] : []));
    return html`<g key=${key} style=${{ color: `var(--${color})` }} onPointerEnter=${() => onPoint?.(key)} onPointerLeave=${() => onPoint?.(null)}>
      <polyline points=${means.map((point) => point.join()).join(" ")} fill="none" stroke="currentcolor" stroke-width="1.6" />
      ${isMany && known.map((figures, index) => figures.length > 0 && html`<line key=${index} x1=${x(index) + shift} x2=${x(index) + shift} y1=${y(Math.min(...figures))} y2=${y(Math.max(...figures))} stroke="currentcolor" stroke-width="3" opacity="0.35" />`)}
      ${!isMany && known.map((figures, index) =>
        figures.map((value, n) => html`<circle key=${`${index}/${n}`} cx=${x(index) + shift} cy=${y(value)} r="2.5" fill="currentcolor" opacity="0.5" />`),
      )}
      ${known.map(
        (figures, index) =>
          figures.length > 0 &&
          html`<circle class="mean" cx=${x(index) + shift} cy=${y(mean(figures))} r="4.5" fill="currentcolor" stroke="var(--surface)" stroke-width="1.5">
            <title>${name && `${name}, `}${xName} ${values[index]}: ${figure(mean(figures))}${figures.length > 1 ? ` (${figure(Math.min(...figures))} – ${figure(Math.max(...figures))}, n = ${figures.length})` : ""}</title>
          </circle>`,
      )}
    </g>`;
  };
  return html`<figure class="by-parameter">
    <div ref=${place} style=${{ minBlockSize: `${height}px` }}>
      ${!isEmpty &&
      html`<svg width=${width} height=${height} role="img" aria-label=${label}>
        ${ticksOf(low, high, logY).map(
          (value) => html`<g key=${value}>
            <line x1=${MARGIN.left} x2=${width - MARGIN.right} y1=${y(value)} y2=${y(value)} class="grid" />
            <text x=${MARGIN.left - 6} y=${y(value) + 4} text-anchor="end">${figure(value, 3)}</text>
          </g>`,
        )}
        ${values.map((name, index) => index % every === 0 && html`<text key=${name} x=${x(index)} y=${height - 24} text-anchor="middle">${name}</text>`)}
        <text x=${(MARGIN.left + width - MARGIN.right) / 2} y=${height - 6} text-anchor="middle" class="axis">${xName}</text>
        ${lines.map(lineOf)}
      </svg>`}
    </div>
    <figcaption>
      ${lines.length > 1 && lines.map(({ key, label: name, color }) => html`<span class="key" key=${key}><span class="hue ${color}"></span>${name}</span>`)}
    </figcaption>
  </figure>`;
}
