/** A job or a sweep to be submitted: the text, what differs from the reference run, and what it would take. */
import { html } from "htm/preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { ApiError, get, getText, mayChange, post } from "../api.js";
import { bytes, count, duration, knobValue, short } from "../format.js";
import { pick, t } from "../i18n.js";
import { ErrorBox, Help, loadStyle, notify, OnlyReads, Skeleton, useData, useSettled, useTitle } from "../parts/basics.js";
import { knobHelp } from "../parts/knob_help.js";
import { href, navigate, queryString, route } from "../router.js";
import { bounds, changed, isSame, knobs, parse } from "../schema.js";
import { GROUPS, WITH_MIXTURE } from "./new/groups.js";
import { ParentField } from "./new/parent_field.js";

await loadStyle("new");

const MOST_SEEDS = 100;
const DRAFT = "nanomoe.text";

function keepDraft(text) {
  try {
    sessionStorage.setItem(DRAFT, text);
  } catch {
    sessionStorage.removeItem(DRAFT); // a book does not fit: it is not kept
  }
}

/** A field's text of a value. */
function written(value) {
  if (value === null) return "";
  return Array.isArray(value) ? value.join(", ") : knobValue(value);
}

/** The knobs of an address: each name of the query that is one, its values separated by `|` where it varies. */
function fromQuery(query, known) {
  return Object.fromEntries(Object.entries(query).filter(([name]) => known[name]).map(([name, text]) => [name, String(text)]));
}

/** The values of a field: one, or several that vary, separated by `|`. `{values}` or `{fault}`. */
function read(knob, text) {
  try {
    const parts = text.split("|").map((part) => part.trim());
    return { values: parts.map((part) => parse(knob, part)) };
  } catch (error) {
    return { fault: error.message };
  }
}

export default function NewJob() {
  useTitle(t("new.title"));
  const { data: known, error } = useData(() => knobs(), []);
  const { data: presets } = useData((signal) => get("/presets", {}, { signal }), []);
  if (!mayChange()) return html`<h1>${t("new.title")}</h1><${OnlyReads} />`;
  if (!known) return html`<h1>${t("new.title")}</h1><${ErrorBox} error=${error} /><${Skeleton} lines="12" />`;
  return html`<${Form} known=${known} presets=${presets?.data ?? []} />`;
}

function Form({ known, presets }) {
  const { query } = route.value;
  // The text is no part of the address, and must outlive a reload all the same.
  const [text, setText] = useState(() => (query.from || query.preset || query.example ? "" : (sessionStorage.getItem(DRAFT) ?? "")));
  useEffect(() => keepDraft(text), [text]);
  const [name, setName] = useState(query.name ?? "");
  const [tags, setTags] = useState(query.tag ?? "");
  const [seeds, setSeeds] = useState(Number(query.seeds ?? 1));
  const [fields, setFields] = useState(() => fromQuery(query, known));
  const [points, setPoints] = useState(null);
  const [refused, refuse] = useState(null);
  const [isSending, send] = useState(false);
  const [preset, setPreset] = useState(query.preset ?? "");

  const take = (one) => {
    setPreset(one?.name ?? "");
    if (!one) return;
    const { text: its, config, grid, points: all, seeds: n } = one.sweep;
    const values = Object.fromEntries(Object.entries(config ?? {}).map(([knob, value]) => [knob, written(value)]));
    for (const [knob, list] of Object.entries(grid ?? {})) values[knob] = list.map((value) => (value === null ? "null" : written(value))).join(" | ");
    setFields(values);
    setPoints(all ?? null);
    setSeeds(n ?? 1);
    if (its) setText(its);
  };
  // An address can name a preset, a job to begin from, or the example; knobs that it names come after these.
  useEffect(() => {
    const one = presets.find((found) => found.name === query.preset);
    if (one) take(one);
    if (query.example && presets.length && !query.preset && !text) setText(presets[0].sweep.text);
  }, [presets.length]);
  useEffect(() => {
    if (!query.from) return;
    Promise.all([get(`/jobs/${encodeURIComponent(query.from)}`), getText(`/jobs/${encodeURIComponent(query.from)}/text`)]).then(
      ([job, its]) => {
        const different = changed(job.config, known);
        setFields({
          ...Object.fromEntries(Object.entries(different).map(([knob, value]) => [knob, written(value)])),
          ...fromQuery(query, known),
        });
        setText(its);
      },
      refuse,
    );
  }, [query.from]);

  const readings = useMemo(
    () => Object.fromEntries(Object.entries(fields).filter(([, given]) => given !== undefined).map(([knob, given]) => [knob, read(known[knob], given)])),
    [fields],
  );
  const isValid = Object.values(readings).every((reading) => !reading.fault);
  const body = useMemo(() => (isValid ? bodyOf({ text, name, tags, seeds, readings, known, points }) : null), [text, name, tags, seeds, readings, points]);
  useAddress({ fields, seeds, preset, name, tags, query });

  const estimate = useEstimate(body);
  const set = (knob, given) => {
    setPreset("");
    setFields((before) => {
      const next = { ...before };
      if (given === undefined) delete next[knob];
      else next[knob] = given;
      return next;
    });
  };
  const submit = async (event) => {
    event.preventDefault();
    if (!body || isSending) return;
    send(true);
    refuse(null);
    try {
      const made = await post(body.isSweep ? "/sweeps" : "/jobs", body.json, { headers: { "Idempotency-Key": crypto.randomUUID() } });
      navigate(href([body.isSweep ? "sweeps" : "jobs", made.id]));
    } catch (error) {
      refuse(error);
      if (error.code === "unreachable") notify(t("common.unreachable"), "error");
      send(false);
    }
  };
  const chosen = presets.find((one) => one.name === preset);
  const shared = { known, fields, readings, set, estimate };
  const isMixture = readings.use_moe?.values?.some((value) => value === true) ?? false;
  return html`<form class="new" onSubmit=${submit}>
    <div class="new-main">
      <h1>${t("new.title")}</h1>
      <div class="presets">
        <label class="field">
          ${t("new.preset")}
          <select value=${preset} onChange=${(event) => take(presets.find((one) => one.name === event.target.value))}>
            <option value="">${t("new.own")}</option>
            ${presets.map((one) => html`<option value=${one.name}>${one.name}</option>`)}
          </select>
        </label>
        ${chosen && html`<p class="look-at"><b>${t("new.look_at")}</b> ${pick(chosen.look_at)}</p>`}
      </div>
      <${TextField} text=${text} setText=${setText} example=${presets[0]?.sweep.text} error=${refused ?? estimate.error} n=${estimate.data?.text?.n_tokens} />
      <div class="names">
        <label class="field">${t("new.name")}<input value=${name} maxlength="200" onInput=${(e) => setName(e.target.value)} /></label>
        <label class="field">${t("new.tags")}<input value=${tags} placeholder="course=nlp-101" onInput=${(e) => setTags(e.target.value)} /></label>
        <label class="field">
          ${t("new.seeds")}
          <input type="number" min="1" max=${MOST_SEEDS} value=${seeds} onInput=${(e) => setSeeds(Math.max(1, Number(e.target.value) || 1))} />
        </label>
      </div>
      ${points &&
      html`<p class="warning">
        ${t("new.points", { n: points.length })} <code>${points.map((point) => JSON.stringify({ ...point, ...(point.text && { text: "…" }) })).join(" ")}</code>
        <button type="button" class="small" onClick=${() => setPoints(null)}>${t("new.no_points")}</button>
      </p>`}
      <p class="muted hint">${t("new.vary_hint")}</p>
      ${GROUPS.map(({ name: group, knobs: names, open }) => {
        const isShown = group !== "mixture" || isMixture;
        const shown = isShown ? names : names.filter((knob) => !WITH_MIXTURE.includes(knob));
        const nChanged = names.filter((knob) => fields[knob] !== undefined).length;
        return html`<details key=${group} open=${open || nChanged > 0 || (group === "mixture" && isMixture)} class="group">
          <summary>${t(`new.group.${group}`)} ${nChanged > 0 && html`<span class="muted">${t("new.changed", { n: nChanged })}</span>`}</summary>
          <div class="knob-list">${shown.map((knob) => html`<${Field} key=${knob} knob=${known[knob]} ...${shared} />`)}</div>
        </details>`;
      })}
    </div>
    <aside class="card estimate" aria-labelledby="estimate-title">
      <h2 id="estimate-title">${t("new.estimate")}</h2>
      <${Estimate} estimate=${estimate} isEmpty=${!text} isValid=${isValid} />
      <${ErrorBox} error=${refused} />
      <button class="primary submit" disabled=${!body || isSending}>
        ${body?.isSweep ? t("new.submit_sweep", { n: estimate.data?.n_jobs ?? "…" }) : t("new.submit")}
      </button>
      ${Object.keys(fields).length > 0 &&
      html`<button type="button" class="small" onClick=${() => { setFields({}); setPoints(null); setSeeds(1); setPreset(""); }}>${t("new.reset")}</button>`}
    </aside>
  </form>`;
}

/** The request's body: `{json, isSweep}`; null without a text. */
function bodyOf({ text, name, tags, seeds, readings, known, points }) {
  if (!text) return null;
  const config = {};
  const grid = {};
  for (const [knob, { values }] of Object.entries(readings)) {
    if (values.length > 1) grid[knob] = values;
    else if (!isSame(values[0], known[knob].default)) [config[knob]] = values;
  }
  const labels = Object.fromEntries(
    tags.split(",").map((tag) => tag.trim()).filter(Boolean).map((tag) => {
      const [key, ...value] = tag.split("=");
      return [key.trim(), value.join("=").trim()];
    }),
  );
  const common = { text, config, ...(name.trim() && { name: name.trim() }), ...(Object.keys(labels).length && { tags: labels }) };
  const isSweep = Boolean(points) || Object.keys(grid).length > 0 || seeds > 1;
  if (!isSweep) return { json: common, isSweep };
  return { json: { ...common, ...(points ? { points } : { grid }), seeds }, isSweep };
}

/** Keeps what was chosen in the address, the text excepted. */
function useAddress({ fields, seeds, preset, name, tags, query }) {
  const kept = { from: query.from, example: query.example, preset, name, tag: tags, seeds: seeds > 1 ? seeds : null, ...fields };
  const address = useSettled(queryString(kept), 300);
  useEffect(() => {
    if (route.value.path[0] === "new") navigate(`/page/new${address}`, { replace: true });
  }, [address]);
}

/** What the service says that the body would take; asked for once typing rests, the old figures staying until then. */
function useEstimate(body) {
  const key = body && JSON.stringify(body);
  const settled = useSettled(key, 300);
  const [state, setState] = useState({ data: null, error: null });
  useEffect(() => {
    if (!settled) return setState({ data: null, error: null });
    const { json, isSweep } = JSON.parse(settled);
    const aborter = new AbortController();
    post(`${isSweep ? "/sweeps" : "/jobs"}?dry_run=true`, json, { signal: aborter.signal }).then(
      (data) => setState({ data: { ...data, isSweep }, error: null }),
      (error) => {
        if (error.name !== "AbortError") setState((before) => ({ ...before, error }));
      },
    );
    return () => aborter.abort();
  }, [settled]);
  return { ...state, isOld: key !== settled };
}

function TextField({ text, setText, example, error, n }) {
  const file = useRef();
  const [isOver, over] = useState(false);
  const readFile = async (given) => {
    if (!given) return;
    try {
      setText(new TextDecoder("utf-8", { fatal: true }).decode(await given.arrayBuffer()));
    } catch {
      notify(t("new.not_utf8", { name: given.name }), "error");
    }
  };
  const faults = error?.errors?.filter(({ loc }) => loc.includes("text")) ?? [];
  return html`<div class="field">
    <div class="part-head">
      <label for="text">${t("new.text")}</label>
      <div class="actions">
        ${text && html`<span class="muted">${bytes(new TextEncoder().encode(text).length)}${n ? `, ${count(n)} ${t("new.tokens")}` : ""}</span>`}
        ${example && html`<button type="button" class="small" onClick=${() => setText(example)}>${t("new.example")}</button>`}
        <button type="button" class="small" onClick=${() => file.current.click()}>${t("new.file")}</button>
        <input ref=${file} type="file" accept="text/*,.txt,.md" class="hidden" tabindex="-1" aria-hidden="true" onChange=${(e) => readFile(e.target.files[0])} />
      </div>
    </div>
    <textarea
      id="text"
      rows="7"
      required
      class=${isOver ? "over" : ""}
      value=${text}
      placeholder=${t("new.text_hint")}
      aria-invalid=${faults.length > 0}
      onInput=${(event) => setText(event.target.value)}
      onDragOver=${(event) => { event.preventDefault(); over(true); }}
      onDragLeave=${() => over(false)}
      onDrop=${(event) => { event.preventDefault(); over(false); readFile(event.dataTransfer.files[0]); }}
    ></textarea>
    ${faults.map(({ msg }) => html`<span class="fault">${msg}</span>`)}
  </div>`;
}

/** A knob: its value or, separated by |, several; what is wrong with it; its bounds and meaning. */
function Field({ knob, fields, readings, set, estimate }) {
  const given = fields[knob.name];
  const reading = readings[knob.name];
  const id = `knob-${knob.name}`;
  const isVaried = (reading?.values?.length ?? 1) > 1;
  const answered = estimate.error instanceof ApiError ? estimate.error.errors.filter(({ loc }) => loc.includes(knob.name)) : [];
  const fault = reading?.fault ? t(`new.fault.${reading.fault}`, { bounds: bounds(knob) }) : answered.map(({ msg }) => msg).join("; ");
  const change = (text) => set(knob.name, text === undefined || (text === "" && knob.default !== null) || text === written(knob.default) ? undefined : text);
  const help = [knobHelp(knob), bounds(knob)].filter(Boolean).join(" ");
  return html`<div class=${`knob ${given !== undefined ? "changed" : ""}`}>
    <label for=${id}><code>${knob.name}</code> ${isVaried && html`<span class="chip">${t("new.varies", { n: reading.values.length })}</span>`}</label>
    <span class="control">
      <${Control} id=${id} knob=${knob} given=${given} isVaried=${isVaried} fault=${fault} change=${change} />
      <${Help} text=${help} label=${knob.name} />
    </span>
    ${fault && html`<span class="fault" id=${`${id}-fault`} role="alert">${fault}</span>`}
  </div>`;
}

function Control({ id, knob, given, isVaried, fault, change }) {
  const choices = knob.kind === "boolean" ? [true, false] : knob.choices;
  if (choices && !isVaried) {
    const options = knob.isOptional ? [null, ...choices] : choices;
    const all = choices.map(String).join(" | ");
    return html`<select id=${id} value=${given ?? written(knob.default)} onChange=${(event) => change(event.target.value)}>
      ${options.map((one) => html`<option value=${written(one)}>${one === null ? "null" : String(one)}</option>`)}
      <option value=${all}>${t("new.each")}</option>
    </select>`;
  }
  if (knob.kind === "parent") return html`<${ParentField} ...${{ id, given, fault, change }} />`;
  return html`<input
    id=${id}
    value=${given ?? ""}
    inputmode=${knob.kind === "integer" || knob.kind === "number" ? "decimal" : null}
    placeholder=${knob.default === null ? "null" : written(knob.default)}
    aria-invalid=${Boolean(fault)}
    aria-describedby=${fault ? `${id}-fault` : null}
    spellcheck="false"
    autocomplete="off"
    onInput=${(event) => change(event.target.value)}
  />`;
}

const about = (seconds) => (seconds ? `≈ ${duration(seconds)}` : "–");

/** Which jobs are trained together: cohorts by their sizes, those that are trained alone last. */
export function cohorts(found) {
  if (!found) return t("new.together_unknown");
  const named = found.map(({ n_jobs: n, n_cohorts: times }) => (n > 1 ? `${count(times)} × ${count(n)}` : t("new.alone", { n: times })));
  return named.join(", ");
}

function Estimate({ estimate, isEmpty, isValid }) {
  const { data, error, isOld } = estimate;
  if (isEmpty) return html`<p class="muted">${t("new.no_text")}</p>`;
  if (!isValid) return html`<p class="muted">${t("new.invalid")}</p>`;
  const faults = html`<${ErrorBox} error=${error} />`;
  if (!data) return error ? faults : html`<${Skeleton} lines="6" />`;
  const shape = data.isSweep ? data.shapes[0] : { ...data.model, ...data };
  const figures = [
    data.isSweep && [t("new.jobs"), count(data.n_jobs)],
    [t("new.parameters"), shape.n_params === null ? "–" : short(shape.n_params), count(shape.n_params)],
    shape.n_active_params !== shape.n_params && [t("new.active"), short(shape.n_active_params), count(shape.n_active_params)],
    !data.isSweep && [t("new.text_tokens"), count(data.text.n_tokens)],
    [data.isSweep ? t("new.steps_all") : t("new.steps"), count(data.total_steps)],
    !data.isSweep && [t("new.steps_per_epoch"), count(data.steps_per_epoch)],
    [t("new.memory"), bytes(data.training_bytes)],
    data.isSweep && [t("new.together"), cohorts(data.cohorts), t("new.together_why")],
    [t("new.time"), about(data.predicted_seconds), t(data.isSweep ? "new.time_sweep_why" : "new.time_why")],
    data.cohorts?.some(({ n_jobs: n }) => n > 1) && [t("new.time_alone"), about(data.predicted_alone_seconds), t("new.time_why")],
  ].filter(Boolean);
  return html`<div class=${isOld ? "old" : ""} aria-live="polite">
    <dl class="table">${figures.map(([name, value, title]) => html`<div key=${name} title=${title}><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
    ${data.isSweep && data.shapes.length > 1 && html`<p class="muted">${t("new.shapes", { n: data.shapes.length })}</p>`}
    ${data.warnings.map(({ code, message, n_jobs: n }) => html`<div class="warning" key=${code + message}><p><b>${code}</b> ${message}${n > 1 ? ` (${t("new.for_jobs", { n })})` : ""}</p></div>`)}
    ${faults}
  </div>`;
}
