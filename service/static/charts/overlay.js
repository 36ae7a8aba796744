/**
 * Many curves over steps in one chart, to 1,000 and more: painted once, and only the one that is pointed at painted over it
 * when the pointer moves. Knows no job.
 */
import { effect } from "@preact/signals";
import { html } from "htm/preact";
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import { count, figure } from "../format.js";
import { language, t } from "../i18n.js";
import { cssColor, loadStyle, useTheme } from "../parts/basics.js";
import { WHOLE_STEPS, onlyDecades } from "./curves.js";

await Promise.all([loadStyle("charts"), loadStyle("../vendor/uplot/uplot")]);

/** A curve is pointed at within this many pixels of it. */
const REACH = 40;

/** More curves than these are painted thinner, and without bands. */
export const MANY = 24;

/** The index of the last x at or below a value; 0 where none is. */
function indexOf(x, value) {
  let [low, high] = [0, x.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (x[middle] <= value) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** The index of the x that is nearest to a value. */
function nearest(x, value) {
  const index = indexOf(x, value);
  return index + 1 < x.length && x[index + 1] - value < value - x[index] ? index + 1 : index;
}

/** The least and the largest value within a range of steps, with a margin. Without bands, which many curves do not have,
 * those of the lines. */
function extremes(curves, isLogY, range) {
  let [low, high] = [Infinity, -Infinity];
  const hasBands = curves.length <= MANY;
  for (const { x, y, low: edge, high: top } of curves) {
    const [from, to] = range ? [indexOf(x, range[0]), indexOf(x, range[1]) + 1] : [0, x.length - 1];
    for (const values of hasBands && edge ? [edge, top] : [y]) {
      for (let i = from; i <= Math.min(to, x.length - 1); i++) {
        const value = values[i];
        if (value === null || (isLogY && value <= 0)) continue;
        if (value < low) low = value;
        if (value > high) high = value;
      }
    }
  }
  if (low > high) return isLogY ? [1, 10] : [0, 1];
  if (isLogY) return [low / 1.1, high * 1.1];
  const margin = (high - low || Math.abs(high) || 1) * 0.04;
  return [low - margin, high + margin];
}

/**
 * Places along an axis as a function of the value, in pixels of the canvas or of the page. What uPlot's `valToPos` finds
 * from the scale at each call is found once here: a thousand curves have a hundred thousand points.
 */
function placer(chart, axis, onCanvas = true) {
  const { min, max, distr } = chart.scales[axis];
  const scaled = distr === 3 ? Math.log10 : (value) => value;
  const [first, last] = [min, max].map((value) => chart.valToPos(value, axis, onCanvas));
  const from = scaled(min);
  const slope = (last - first) / (scaled(max) - from || 1);
  return (value) => first + (scaled(value) - from) * slope;
}

/** The places of steps and values on a chart's canvas: `{left, top}`. */
const placesOf = (chart) => ({ left: placer(chart, "x"), top: placer(chart, "y") });

/** The path of some values, with gaps where they are null. */
function trace(ctx, { left, top }, x, values) {
  let isDown = false;
  for (let i = 0; i < x.length; i++) {
    const value = values[i];
    if (value === null || Number.isNaN(value)) {
      isDown = false;
      continue;
    }
    if (isDown) ctx.lineTo(left(x[i]), top(value));
    else ctx.moveTo(left(x[i]), top(value));
    isDown = true;
  }
}

function fillBand(ctx, places, { x, low, high }) {
  ctx.beginPath();
  trace(ctx, places, x, high);
  for (let i = x.length - 1; i >= 0; i--) {
    if (low[i] !== null) ctx.lineTo(places.left(x[i]), places.top(low[i]));
  }
  ctx.closePath();
  ctx.fill();
}

function clip(ctx, { left, top, width, height }) {
  ctx.beginPath();
  ctx.rect(left, top, width, height);
  ctx.clip();
}

function paintAll(chart, curves, colors) {
  const { ctx } = chart;
  const places = placesOf(chart);
  ctx.save();
  clip(ctx, chart.bbox);
  ctx.lineJoin = "round";
  const isMany = curves.length > MANY;
  ctx.lineWidth = (isMany ? 1 : 1.6) * devicePixelRatio;
  if (!isMany) {
    ctx.globalAlpha = 0.16;
    for (const curve of curves) {
      if (!curve.low) continue;
      ctx.fillStyle = colors.get(curve.color);
      fillBand(ctx, places, curve);
    }
  }
  ctx.globalAlpha = isMany ? Math.max(0.25, Math.min(1, 60 / curves.length)) : 1;
  for (const curve of curves) {
    ctx.strokeStyle = colors.get(curve.color);
    ctx.beginPath();
    trace(ctx, places, curve.x, curve.y);
    ctx.stroke();
  }
  ctx.restore();
}

/** A vertical line at the step whose values are compared. */
function paintStep(chart, step, color) {
  if (step === null) return;
  const { ctx, bbox } = chart;
  const left = Math.round(chart.valToPos(step, "x", true));
  if (!(left >= bbox.left && left <= bbox.left + bbox.width)) return;
  ctx.save();
  ctx.strokeStyle = color;
  ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
  ctx.beginPath();
  ctx.moveTo(left, bbox.top);
  ctx.lineTo(left, bbox.top + bbox.height);
  ctx.stroke();
  ctx.restore();
}

/** The curve next to the pointer, or null: `{curve, index}`. */
function findNear(chart, curves) {
  const { left, top } = chart.cursor;
  if (left === null || left < 0 || top < 0) return null;
  const step = chart.posToVal(left, "x");
  const placeOf = placer(chart, "y", false);
  let found = null;
  let least = REACH;
  for (const curve of curves) {
    if (!curve.x.length || step > curve.x[curve.x.length - 1] * 1.02) continue;
    const index = nearest(curve.x, step);
    if (curve.y[index] === null) continue;
    const distance = Math.abs(placeOf(curve.y[index]) - top);
    if (distance < least) [least, found] = [distance, { curve, index }];
  }
  return found;
}

/** A name beside its colour, which are not broken over two lines. */
function named(color, ...content) {
  const [made, swatch] = [document.createElement("span"), document.createElement("span")];
  made.className = "key";
  swatch.className = `hue ${color}`;
  made.append(swatch, ...content);
  return made;
}

/** The names of the curves, where these are few; of many the one that is pointed at has to do. */
const legend = (curves) => (curves.length > 8 ? [] : curves.map(({ color, label }) => named(color, label)));

/**
 * `curves`: `[{key, label, color, x, y, low, high}]`: `x` rises; `y` may hold null; `low` and `high`, the edges of a band,
 * may be missing; `color` is a name of base.css. `pointed`: a signal of the key of the curve that is pointed at, here or
 * elsewhere, or null. `step`: where a vertical line stands, or null; `onStep(step)`: a click. `range`, `onZoom(range)`: the
 * steps that are shown, and what was dragged over, null for a double click. `label` says in words what it shows.
 */
export function Overlay({ label, curves, pointed, logX, logY, height = 300, range = null, onZoom, step = null, onStep }) {
  const place = useRef();
  const caption = useRef();
  const chart = useRef(null);
  const theme = useTheme();
  const now = useRef({});
  now.current = { curves, onZoom, onStep, step };

  const say = (key, index = null) => {
    const curve = now.current.curves.find((one) => one.key === key);
    if (!caption.current) return;
    if (!curve?.x.length) return caption.current.replaceChildren(...legend(now.current.curves));
    const at = index ?? curve.x.length - 1;
    const text = document.createElement("b");
    text.textContent = figure(curve.y[at]);
    caption.current.replaceChildren(named(curve.color, `${curve.label} · ${t("common.step")} ${count(curve.x[at])}: `, text));
  };

  useEffect(() => {
    const [grid, muted] = [cssColor("line"), cssColor("muted")];
    // Asked for once: each costs the style of the whole document anew, where something in it has changed.
    const colors = new Map(["surface", ...new Set(curves.map(({ color }) => color))].map((name) => [name, cssColor(name)]));
    const axis = { stroke: muted, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, size: 4 }, font: "11px system-ui" };
    const [low, high] = extremes(curves, logY, range);
    const last = Math.max(2, ...curves.map(({ x }) => x[x.length - 1] ?? 0));
    const upper = document.createElement("canvas");
    upper.className = "over";

    const paintPointed = (key) => {
      const { width, height: tall } = chart.current.ctx.canvas;
      const ctx = upper.getContext("2d");
      if (upper.width !== width || upper.height !== tall) [upper.width, upper.height] = [width, tall];
      ctx.clearRect(0, 0, width, tall);
      const curve = now.current.curves.find((one) => one.key === key);
      if (!curve) return;
      const places = placesOf(chart.current);
      ctx.save();
      clip(ctx, chart.current.bbox);
      ctx.lineJoin = "round";
      for (const [color, wide] of [["surface", 6], [curve.color, 3]]) {
        ctx.strokeStyle = colors.get(color);
        ctx.lineWidth = wide * devicePixelRatio;
        ctx.beginPath();
        trace(ctx, places, curve.x, curve.y);
        ctx.stroke();
      }
      ctx.restore();
    };
    const options = {
      width: Math.max(place.current.clientWidth, 100),
      height,
      padding: [8, 18, 0, 0],
      legend: { show: false },
      cursor: { y: false, points: { show: false }, drag: { x: true, y: false, dist: 6 } },
      scales: {
        x: { time: false, distr: logX ? 3 : 1, range: () => range ?? [logX ? 1 : 0, last] },
        y: { distr: logY ? 3 : 1, range: () => [low, high] },
      },
      axes: [
        { ...axis, size: 26, ...(!logX && { incrs: WHOLE_STEPS }), values: (_, splits) => splits.map((x) => (x === null ? "" : count(x))) },
        { ...axis, ...(logY && onlyDecades(axis)), size: 58, values: (_, splits) => splits.map((y) => (y === null ? "" : figure(y, 3))) },
      ],
      series: [{}, { show: true, points: { show: false }, stroke: "transparent" }],
      hooks: {
        draw: [
          (self) => {
            paintStep(self, now.current.step, muted);
            paintAll(self, curves, colors);
          },
        ],
        setCursor: [
          (self) => {
            const near = findNear(self, now.current.curves);
            if (near) {
              pointed.value = near.curve.key;
              say(near.curve.key, near.index);
              // A new chart begins with a cursor outside: what a row of the table points at stays when new values come.
            } else if (self.cursor.left >= 0) pointed.value = null;
          },
        ],
        setSelect: [
          (self) => {
            if (self.select.width < 6) return;
            const ends = [self.select.left, self.select.left + self.select.width];
            now.current.onZoom?.(ends.map((end) => Math.max(Math.round(self.posToVal(end, "x")), 0)));
            self.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          },
        ],
      },
    };
    const ends = range ?? [logX ? 1 : 0, last];
    chart.current = new uPlot(options, [ends, [low, high]], place.current);
    place.current.querySelector(".u-wrap").append(upper);
    const { over } = chart.current;
    over.addEventListener("dblclick", () => now.current.onZoom?.(null));
    over.addEventListener("click", () => {
      if (chart.current.select.width < 6) now.current.onStep?.(Math.max(Math.round(chart.current.posToVal(chart.current.cursor.left, "x")), 1));
    });
    const stop = effect(() => {
      paintPointed(pointed.value);
      say(pointed.value);
    });
    const observer = new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width > 0 && width !== chart.current?.width) chart.current?.setSize({ width, height });
    });
    observer.observe(place.current);
    return () => {
      stop();
      observer.disconnect();
      chart.current.destroy();
      chart.current = null;
    };
  }, [curves, logX, logY, range, height, theme, language.value]);
  useEffect(() => chart.current?.redraw(false), [step]);

  const move = (event) => {
    const turn = { ArrowUp: -1, ArrowDown: 1, ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!turn || !curves.length) return;
    event.preventDefault();
    const index = curves.findIndex(({ key }) => key === pointed.value);
    pointed.value = curves[(index + turn + curves.length) % curves.length].key;
  };
  return html`<figure class="overlay">
    <div
      ref=${place}
      role="img"
      aria-label=${label}
      tabindex="0"
      onKeyDown=${move}
      onPointerLeave=${() => (pointed.value = null)}
      style=${{ minBlockSize: `${height}px` }}
    ></div>
    <figcaption ref=${caption} aria-live="polite"></figcaption>
  </figure>`;
}
