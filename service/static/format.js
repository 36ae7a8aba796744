/** Figures as text, in the chosen language: counts, losses, durations, times, bytes. Null is an en dash. */
import { language } from "./i18n.js";

const NONE = "–";
const made = new Map();

/** One of `Intl`'s formats in the chosen language. Kept: making one takes a hundred times as long as using it. */
function format(Kind, options) {
  const key = `${Kind.name}${language.value}${JSON.stringify(options)}`;
  if (!made.has(key)) made.set(key, new Kind(language.value, options));
  return made.get(key);
}

const number = (options) => format(Intl.NumberFormat, options);

const isNone = (value) => value === null || value === undefined || Number.isNaN(value);

/** A count, in full: 1,850,000. */
export const count = (value) => (isNone(value) ? NONE : number({ maximumFractionDigits: 0 }).format(value));

/** A count, short: 1.85 M. */
export const short = (value) =>
  isNone(value) ? NONE : number({ notation: "compact", maximumSignificantDigits: 3 }).format(value);

/** A measured figure with `digits` significant digits; very large and small ones in powers of ten. */
export function figure(value, digits = 4) {
  if (isNone(value)) return NONE;
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-3 || size >= 1e7)) {
    return number({ notation: "scientific", maximumSignificantDigits: Math.max(digits - 1, 1) }).format(value).replace("E", "e");
  }
  if (size >= 1000) return number({ maximumFractionDigits: size >= 10000 ? 0 : 1 }).format(value);
  return number({ minimumSignificantDigits: digits, maximumSignificantDigits: digits }).format(value);
}

/** A knob's value as it is written in a config: 0.0001 is 1e-4, null is `null`; a job's checkpoint is `ID@PERCENT`. */
export function knobValue(value) {
  if (typeof value === "string") return value;
  if (value?.job_id) return `${value.job_id}@${value.checkpoint}`;
  if (typeof value !== "number") return JSON.stringify(value);
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential().replace("e+", "e");
  return String(value);
}

/** A share of 1 in percent. */
export const percent = (value, digits = 0) =>
  isNone(value)
    ? NONE
    : number({ style: "percent", minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value);

/** Bytes: 1.9 GB. */
export function bytes(value) {
  if (isNone(value)) return NONE;
  const units = ["byte", "kilobyte", "megabyte", "gigabyte", "terabyte"];
  const rank = Math.min(Math.floor(Math.log10(Math.max(value, 1)) / 3), units.length - 1);
  return number({ style: "unit", unit: units[rank], unitDisplay: rank ? "short" : "long", maximumSignificantDigits: 3 })
    .format(value / 1000 ** rank);
}

/** A duration: 4.2 s, 3 min 20 s, 2 h 05 min, 3 d 4 h. */
export function duration(seconds) {
  if (isNone(seconds)) return NONE;
  if (seconds < 9.95) return `${number({ maximumFractionDigits: 1 }).format(seconds)} s`;
  const whole = Math.round(seconds);
  const two = (n) => String(n).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${two(Math.floor((whole % 3600) / 60))} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

/** How long ago a time was: 5 minutes ago. */
export function ago(time, now = Date.now()) {
  if (!time) return NONE;
  const seconds = (new Date(time).getTime() - now) / 1000;
  const relative = format(Intl.RelativeTimeFormat, { numeric: "auto", style: "short" });
  for (const [unit, size] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    if (Math.abs(seconds) >= size) return relative.format(Math.round(seconds / size), unit);
  }
  return relative.format(Math.round(seconds), "second");
}

/** A point in time: 29 Nov, 09:22:08. */
export function moment(time) {
  if (!time) return NONE;
  const options = { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit" };
  return format(Intl.DateTimeFormat, options).format(new Date(time));
}
