/**
 * A table of numbers as colours, on a canvas: rows and columns with names, the value of a cell on hover, a choice by click
 * and by the arrow keys. Knows no job.
 */
import { html } from "htm/preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { cssColor, loadStyle, useTheme } from "../parts/basics.js";

await loadStyle("charts");

const LEFT = 74;
const TOP = 20;

/** The two ends of a scale mixed in a canvas' colour space: `share` 0 is the page's surface, 1 the colour. */
function mixer(name) {
  const parse = (color) => color.match(/[\d.]+/g).slice(0, 3).map(Number);
  const [from, to] = [parse(cssColor("surface")), parse(cssColor(name))];
  return (share) => `rgb(${from.map((part, i) => Math.round(part + (to[i] - part) * share)).join(",")})`;
}

/**
 * `rows`, `columns`: names. `values[row][column]`: numbers, or null for none. `scale(value)` -> 0 to 1; `format(value)`
 * -> text. `chosen`: `[row, column]` or null, and `onChoose(row, column)`. `label` says in words what it shows.
 * `rowName`, `columnName`: what rows and columns are. `describe(row, column)`: a sentence for the cell under the pointer.
 */
export function HeatMap({
  rows, columns, values, scale, format, label, rowName = "", columnName = "", chosen = null, onChoose, describe, color = "accent",
}) {
  const canvas = useRef();
  const [width, setWidth] = useState(0);
  const [pointed, point] = useState(null);
  const theme = useTheme();
  const cellWidth = width ? Math.min(Math.max((width - LEFT) / columns.length, 4), 72) : 0;
  const cellHeight = rows.length > 40 ? 12 : 24;
  const height = TOP + cellHeight * rows.length + 2;

  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.round(entry.contentRect.width)));
    observer.observe(canvas.current.parentElement);
    return () => observer.disconnect();
  }, []);

  useEffect(() => {
    if (!width) return;
    const element = canvas.current;
    const dots = devicePixelRatio;
    element.width = width * dots;
    element.height = height * dots;
    const ctx = element.getContext("2d");
    ctx.scale(dots, dots);
    ctx.clearRect(0, 0, width, height);
    const mix = mixer(color);
    const [text, muted, surface, line] = ["text", "muted", "surface", "line"].map(cssColor);
    ctx.font = "11px system-ui, sans-serif";
    ctx.textBaseline = "middle";
    ctx.fillStyle = muted;
    ctx.textAlign = "right";
    rows.forEach((name, row) => {
      if (cellHeight >= 16 || row % 4 === 0) ctx.fillText(name, LEFT - 8, TOP + (row + 0.5) * cellHeight, LEFT - 10);
    });
    ctx.textAlign = "center";
    const every = Math.ceil(28 / cellWidth);
    columns.forEach((name, column) => {
      if (column % every === 0) ctx.fillText(name, LEFT + (column + 0.5) * cellWidth, TOP / 2);
    });
    values.forEach((cells, row) =>
      cells.forEach((value, column) => {
        const [x, y] = [LEFT + column * cellWidth, TOP + row * cellHeight];
        const share = value === null ? 0 : Math.min(Math.max(scale(value), 0), 1);
        ctx.fillStyle = mix(share);
        ctx.fillRect(x + 0.5, y + 0.5, cellWidth - 1, cellHeight - 1);
        ctx.strokeStyle = line;
        ctx.lineWidth = 0.5;
        ctx.strokeRect(x + 0.5, y + 0.5, cellWidth - 1, cellHeight - 1);
        const shown = value === null ? "–" : format(value);
        if (cellHeight >= 16 && ctx.measureText(shown).width < cellWidth - 6) {
          ctx.fillStyle = share > 0.55 ? surface : text;
          ctx.fillText(shown, x + cellWidth / 2, y + cellHeight / 2);
        }
      }),
    );
    for (const [cell, ink] of [[pointed, muted], [chosen, text]]) {
      if (!cell || cell[0] === null || cell[0] >= rows.length) continue;
      ctx.strokeStyle = ink;
      ctx.lineWidth = 2;
      const isRow = cell[1] === null || cell[1] === undefined;
      ctx.strokeRect(
        LEFT + (isRow ? 0 : cell[1] * cellWidth) + 1, TOP + cell[0] * cellHeight + 1,
        (isRow ? columns.length : 1) * cellWidth - 2, cellHeight - 2,
      );
    }
  }, [width, height, values, rows, columns, chosen, pointed, theme, color, scale]);

  const cellAt = (event) => {
    const box = canvas.current.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - LEFT) / cellWidth);
    const row = Math.floor((event.clientY - box.top - TOP) / cellHeight);
    return row >= 0 && row < rows.length && column >= 0 && column < columns.length ? [row, column] : null;
  };
  const move = (event) => {
    const [dRow, dColumn] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [];
    if (event.key === "Enter" && pointed) onChoose?.(...pointed);
    if (dRow === undefined) return;
    event.preventDefault();
    const [row, column] = pointed ?? [Math.max(chosen?.[0] ?? 0, 0), Math.max(chosen?.[1] ?? 0, 0)];
    point([
      Math.min(Math.max(row + dRow, 0), rows.length - 1),
      Math.min(Math.max(column + dColumn, 0), columns.length - 1),
    ]);
  };
  const shown = pointed && pointed[0] < rows.length && pointed[1] < columns.length ? pointed : null;
  const sentence = shown && (describe?.(...shown) ?? `${rowName} ${rows[shown[0]]}, ${columnName} ${columns[shown[1]]}: ${format(values[shown[0]][shown[1]])}`);
  return html`<figure class="heat-map">
    <div>
      <canvas
        ref=${canvas}
        role="img"
        aria-label=${label}
        tabindex="0"
        style=${{ blockSize: `${height}px`, cursor: onChoose ? "pointer" : "default" }}
        onPointerMove=${(event) => point(cellAt(event))}
        onPointerLeave=${() => point(null)}
        onBlur=${() => point(null)}
        onKeyDown=${move}
        onClick=${(event) => {
          const cell = cellAt(event);
          if (cell) onChoose?.(...cell);
        }}
      ></canvas>
    </div>
    <figcaption aria-live="polite">${sentence || html`<span class="muted">${columnName}</span>`}</figcaption>
  </figure>`;
}
