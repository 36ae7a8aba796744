/**
 * The knobs of a job as the OpenAPI document declares them: kind, bounds, default, choices, help. Declared in the
 * service's code alone.
 */
import { get } from "./api.js";
import { count } from "./format.js";

let document_ = null;

function openapi() {
  document_ ??= get("/openapi.json").catch((error) => {
    document_ = null;
    throw error;
  });
  return document_;
}

/** Name -> knob of `JobConfig`. */
export const knobs = () => fieldsOf("JobConfig");

/** Name -> field of a schema, each like a knob. */
export async function fieldsOf(schema) {
  const { properties } = (await openapi()).components.schemas[schema];
  return Object.fromEntries(Object.entries(properties).map(([name, one]) => [name, knob(name, one)]));
}

/** The metrics that jobs can be compared by. */
export async function metricNames() {
  const { parameters } = (await openapi()).paths["/compare"].get;
  return parameters.find((one) => one.name === "metric").schema.items.enum;
}

/**
 * `{name, kind, isOptional, default, help, minimum, maximum, exclusiveMinimum, exclusiveMaximum, choices}`; `kind` is
 * integer, number, boolean, string, choice, pair or parent.
 */
function knob(name, schema) {
  const kinds = (schema.anyOf ?? [schema]).filter((one) => one.type !== "null");
  const { type, enum: choices, prefixItems, $ref, ...bounds } = kinds[0];
  const kind = choices ? "choice" : prefixItems ? "pair" : $ref ? "parent" : type;
  return {
    name, kind, choices, prefixItems,
    isOptional: Boolean(schema.anyOf),
    default: schema.default ?? null,
    help: (schema.description ?? "").replace(/\s+/g, " "),
    minimum: bounds.minimum,
    maximum: bounds.maximum,
    exclusiveMinimum: bounds.exclusiveMinimum,
    exclusiveMaximum: bounds.exclusiveMaximum,
  };
}

/** Whether two values of a knob are the same. */
export const isSame = (a, b) => JSON.stringify(a) === JSON.stringify(b);

/** The knobs of a config that differ from the defaults. */
export function changed(config, known) {
  return Object.fromEntries(
    Object.entries(config).filter(([name, value]) => known[name] && !isSame(value, known[name].default)),
  );
}

/** The value of a knob that a field's text stands for. Raises an Error with the key of a message of i18n. */
export function parse(knob, text) {
  const given = String(text).trim();
  if (given === "" || given === "null") {
    if (knob.isOptional) return null;
    throw new Error("needed");
  }
  if (knob.kind === "integer" || knob.kind === "number") return parseNumber(knob, given);
  if (knob.kind === "pair") {
    const parts = given.replace(/[[\]]/g, "").split(/[,;\s]+/).filter(Boolean);
    if (parts.length !== 2) throw new Error("two_numbers");
    return parts.map((part, i) => parseNumber({ kind: "number", ...knob.prefixItems[i] }, part));
  }
  if (knob.kind === "boolean") return given === "true";
  if (knob.kind === "parent") {
    const [, job_id, percent] = /^(.+?)(?:@(\d+))?$/.exec(given);
    return { job_id, checkpoint: Number(percent ?? 100) };
  }
  return given;
}

function parseNumber({ kind, minimum, maximum, exclusiveMinimum, exclusiveMaximum }, text) {
  const value = Number(text);
  if (!Number.isFinite(value)) throw new Error("number");
  if (kind === "integer" && !Number.isInteger(value)) throw new Error("integer");
  const fits =
    value >= (minimum ?? -Infinity) && value <= (maximum ?? Infinity) &&
    value > (exclusiveMinimum ?? -Infinity) && value < (exclusiveMaximum ?? Infinity);
  if (!fits) throw new Error("bounds");
  return value;
}

/** The bounds of a knob in signs: `≥ 1, ≤ 256`. */
export function bounds({ minimum, maximum, exclusiveMinimum, exclusiveMaximum }) {
  const shown = [["≥", minimum], [">", exclusiveMinimum], ["≤", maximum], ["<", exclusiveMaximum]];
  return shown.filter(([, value]) => value !== undefined).map(([sign, value]) => `${sign} ${bound(value)}`).join(", ");
}

function bound(value) {
  return Math.abs(value) >= 1000 && Number.isSafeInteger(value) ? count(value) : String(value);
}
