/**
 * Curves over steps, on a canvas by uPlot: bands, log axes, zoom by dragging, the values at the cursor, lines to compare
 * with. Knows no job.
 */
import { html } from "htm/preact";
import { useEffect, useMemo, useRef } from "preact/hooks";
import uPlot from "uplot";
import { count, figure, short } from "../format.js";
import { language, t } from "../i18n.js";
import { cssColor, loadStyle, useTheme } from "../parts/basics.js";

await Promise.all([loadStyle("charts"), loadStyle("../vendor/uplot/uplot")]);

/** The extremes of a series and the middle between them, in `n` stretches of equal numbers of points: `{x, low, middle,
 * high}`. A series of at most `n` points comes back as it is, low and high being null. */
export function envelope(x, y, n) {
  if (x.length <= n) return { x, middle: y, low: null, high: null };
  const found = { x: [], low: [], middle: [], high: [] };
  for (let stretch = 0; stretch < n; stretch++) {
    const from = Math.floor((stretch * x.length) / n);
    const to = Math.floor(((stretch + 1) * x.length) / n);
    const values = y.slice(from, to).filter((value) => value !== null).sort((a, b) => a - b);
    found.x.push(x[(from + to - 1) >> 1]);
    found.low.push(values[0] ?? null);
    found.middle.push(values[values.length >> 1] ?? null);
    found.high.push(values[values.length - 1] ?? null);
  }
  return found;
}

/** Several series over one x axis, as uPlot wants them: the x of all, and each y at these, null where it has none. */
function align(columns) {
  const first = columns[0]?.x;
  if (columns.every(({ x }) => x === first)) return [first ?? [], ...columns.map(({ y }) => y)];
  const xs = new Float64Array(new Set(columns.flatMap(({ x }) => Array.from(x)))).sort();
  const place = new Map(Array.from(xs, (x, index) => [x, index]));
  const aligned = columns.map(({ x, y }) => {
    const values = new Array(xs.length).fill(undefined);
    for (let i = 0; i < x.length; i++) values[place.get(x[i])] = y[i];
    return values;
  });
  return [Array.from(xs), ...aligned];
}

/** Distances between marks of an axis of steps, which are whole numbers. */
export const WHOLE_STEPS = Array.from({ length: 10 }, (_, power) => [1, 2, 5].map((n) => n * 10 ** power)).flat();

/** Over more than two decades only their beginnings have lines: all nine of each would be a grey wall. */
export function onlyDecades({ grid, ticks }) {
  const filter = (chart, splits) => {
    const { min, max } = chart.scales.y;
    return max / min < 100 ? splits : splits.map((y) => (y !== null && Number.isInteger(Math.round(Math.log10(y) * 1e6) / 1e6) ? y : null));
  };
  return { grid: { ...grid, filter }, ticks: { ...ticks, filter } };
}

/** Each series as columns: its line, and before it the edges of its band. */
function columnsOf(series, isLog) {
  const positive = (values) => (isLog ? values.map((value) => (value > 0 ? value : null)) : values);
  return series.flatMap((one, index) => {
    const line = { x: one.x, y: positive(one.y), series: one, index };
    if (!one.low) return [line];
    return [
      { x: one.x, y: positive(one.high), edge: true, series: one, index },
      { x: one.x, y: positive(one.low), edge: true, series: one, index },
      line,
    ];
  });
}

function padded(low, high, isLog) {
  if (low === null || high === null) return isLog ? [1, 10] : [0, 1];
  if (isLog) return [low / 1.15, high * 1.15];
  const margin = (high - low || Math.abs(high) || 1) * 0.05;
  return [low - margin, high + margin];
}

/** Horizontal lines with their names at the right edge. */
function drawLines(chart, lines) {
  const { ctx, bbox } = chart;
  ctx.save();
  ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.textAlign = "right";
  ctx.textBaseline = "bottom";
  ctx.fillStyle = ctx.strokeStyle = cssColor("muted");
  ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
  const shown = lines.map(({ y, label }) => ({ label, place: Math.round(chart.valToPos(y, "y", true)) }));
  let [last, indent] = [-Infinity, 0];
  for (const { place, label } of shown.sort((a, b) => a.place - b.place)) {
    if (!(place >= bbox.top && place <= bbox.top + bbox.height)) continue;
    // A name that would lie upon the one before stands to its left.
    indent = place - last < 13 * devicePixelRatio ? indent + 90 * devicePixelRatio : 0;
    last = place;
    ctx.beginPath();
    ctx.moveTo(bbox.left, place);
    ctx.lineTo(bbox.left + bbox.width, place);
    ctx.stroke();
    ctx.fillText(label, bbox.left + bbox.width - 4 - indent, place - devicePixelRatio);
  }
  ctx.restore();
}

function optionsOf({ columns, isLogX, isLogY, lines, format, sync, range, onZoom, onCursor, xTime }, width, height) {
  const [grid, muted] = [cssColor("line"), cssColor("muted")];
  const axis = { stroke: muted, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, size: 4 }, font: "11px system-ui" };
  const paint = (column) => {
    const color = cssColor(column.series.color ?? `series-${column.index % 8}`);
    if (column.edge) return { stroke: "transparent", width: 0, points: { show: false }, spanGaps: true };
    const isDots = column.series.dots;
    return {
      stroke: color,
      width: isDots ? 0 : (column.series.width ?? 1.5),
      dash: column.series.dash,
      alpha: column.series.alpha ?? 1,
      spanGaps: true,
      points: isDots ? { show: true, size: 8, fill: color, stroke: cssColor("surface"), width: 1.5 } : { show: false },
    };
  };
  const bands = columns.flatMap((column, index) =>
    column.edge && columns[index + 1]?.edge && columns[index + 1].series === column.series
      ? [{ series: [index + 1, index + 2], fill: fade(cssColor(column.series.color ?? `series-${column.index % 8}`), 0.2) }]
      : [],
  );
  return {
    width,
    height,
    padding: [8, 18, 0, 0],
    legend: { show: false },
    cursor: {
      sync: sync ? { key: sync, setSeries: false } : undefined,
      drag: { x: true, y: false, dist: 6 },
      points: { size: 7 },
    },
    scales: {
      x: { time: false, distr: isLogX ? 3 : 1, range: (_, low, high) => range ?? [low, high === low ? low + 1 : high] },
      y: {
        distr: isLogY ? 3 : 1,
        range: (_, low, high) => {
          const shown = lines.map(({ y }) => y).filter((y) => !isLogY || y > 0);
          return padded(Math.min(low ?? Infinity, ...shown), Math.max(high ?? -Infinity, ...shown), isLogY);
        },
      },
    },
    axes: [
      { ...axis, size: 26, ...(!isLogX && { incrs: WHOLE_STEPS }), values: (_, splits) => splits.map((x) => (x === null ? "" : xTime ? xTime(x) : count(x))) },
      { ...axis, ...(isLogY && onlyDecades(axis)), size: 58, values: (_, splits) => splits.map((y) => (y === null ? "" : Math.abs(y) >= 1e5 ? short(y) : format(y, 3))) },
    ],
    series: [{}, ...columns.map(paint)],
    bands,
    hooks: {
      draw: [(chart) => drawLines(chart, lines)],
      setCursor: [(chart) => onCursor(chart.cursor.idx)],
      setSelect: [
        (chart) => {
          if (chart.select.width < 6) return;
          const ends = [chart.select.left, chart.select.left + chart.select.width];
          onZoom?.(ends.map((place) => Math.round(chart.posToVal(place, "x"))));
          chart.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        },
      ],
    },
  };
}

const fade = (color, alpha) => color.replace(/^rgb\((.*)\)$/, `rgba($1, ${alpha})`);

/**
 * Curves with their names and, at the cursor, their values.
 *
 * `series`: `[{label, x, y, low, high, color, dash, width, alpha, dots}]`, of which only `label`, `x`, `y` must be there;
 * `low` and `high` make a band; `color` is a name of base.css. `lines`: `[{y, label}]`, horizontal ones to compare with.
 * `label` says in words what the chart shows. `range`: the x that are shown, or null for all; `onZoom(range)` is called
 * with what was dragged over, and with null for a double click. `sync`: charts of one name share their cursor.
 * `hover(x, values)`: called at each move, for more than the values; null outside.
 */
export function Curves({
  label, series, lines = [], logX = false, logY = false, height = 220, range = null, onZoom, sync, format = figure,
  xName, hover, legend = true,
}) {
  const place = useRef();
  const legendPlace = useRef();
  const chart = useRef(null);
  const theme = useTheme();
  const columns = useMemo(() => columnsOf(series, logY), [series, logY]);
  const data = useMemo(() => align(columns), [columns]);
  const now = useRef({});
  now.current = { columns, data, hover, onZoom, format };

  const showValues = (index) => {
    const { columns, data, hover, format } = now.current;
    const at = index ?? data[0].length - 1;
    const cells = legendPlace.current?.querySelectorAll("output") ?? [];
    columns.filter((column) => !column.edge).forEach((column, n) => {
      const y = data[columns.indexOf(column) + 1];
      let near = at;
      while (near > 0 && (y[near] === undefined || y[near] === null)) near--;
      if (cells[n]) cells[n].value = format(y[near]);
    });
    if (cells.length) cells[cells.length - 1].value = data[0].length ? count(data[0][at]) : "–";
    hover?.(index === null || index === undefined ? null : data[0][index], index);
  };

  // The shape of the chart decides when it is made anew; new values of the same series only replace the data.
  const shape = JSON.stringify([
    logX, logY, range, lines, theme, language.value, sync, height,
    columns.map(({ edge, series: one }) => [edge, one.label, one.color, one.dots, one.dash]),
  ]);
  useEffect(() => {
    const options = optionsOf(
      {
        columns, isLogX: logX, isLogY: logY, lines, sync, range,
        format: (y, digits) => now.current.format(y, digits),
        onZoom: (ends) => now.current.onZoom?.(ends),
        onCursor: showValues,
      },
      Math.max(place.current.clientWidth, 100),
      height,
    );
    chart.current = new uPlot(options, now.current.data, place.current);
    chart.current.over.addEventListener("dblclick", () => now.current.onZoom?.(null));
    showValues(null);
    const observer = new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width > 0 && width !== chart.current?.width) chart.current?.setSize({ width, height });
    });
    observer.observe(place.current);
    return () => {
      observer.disconnect();
      chart.current.destroy();
      chart.current = null;
    };
  }, [shape]);
  useEffect(() => {
    if (chart.current && chart.current.data !== data) chart.current.setData(data);
    showValues(chart.current?.cursor.idx ?? null);
  }, [data]);

  const move = (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
    if (!steps || !chart.current) return;
    event.preventDefault();
    const { idx } = chart.current.cursor;
    const next = Math.min(Math.max((idx ?? 0) + steps, 0), data[0].length - 1);
    chart.current.setCursor({ left: chart.current.valToPos(data[0][next], "x"), top: height / 2 });
  };
  const named = columns.filter((column) => !column.edge);
  return html`<figure class="curves">
    <div ref=${place} role="img" aria-label=${label} tabindex="0" onKeyDown=${move} style=${{ minBlockSize: `${height}px` }}></div>
    ${legend &&
    html`<figcaption ref=${legendPlace}>
      ${named.map(
        ({ series: one, index }) => html`<span class="key" key=${one.label}>
          <span class=${one.dots ? "dot" : "line"} style=${{ background: `var(--${one.color ?? `series-${index % 8}`})` }}></span>
          ${one.label} <output></output>
        </span>`,
      )}
      <span class="key muted">${xName ?? t("common.step")} <output></output></span>
    </figcaption>`}
  </figure>`;
}
