/** What checkpoints make of a text: they continue it, side by side; they are surprised by it; they attend and route. */
import { html } from "htm/preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { get } from "../api.js";
import { t } from "../i18n.js";
import { ErrorBox, Help, loadStyle, useData, useTitle } from "../parts/basics.js";
import { Continuations } from "../parts/continuations.js";
import { Inspection } from "../parts/inspection.js";
import { Scores } from "../parts/scores.js";
import { queryList, route, setQuery } from "../router.js";
import { bounds, fieldsOf, parse } from "../schema.js";

await Promise.all([loadStyle("compare"), loadStyle("generate")]);

const MODES = ["continue", "score", "inspect"];
const SAMPLING = ["max_new_tokens", "temperature", "top_k", "top_p", "seed"];
const PERCENTS = ["latest", "100", "75", "50", "25", "0"];
const LONGEST_IN_ADDRESS = 2000;

/** `JOB@PERCENT` as the API takes it; without a percent, the newest checkpoint. */
function parseTarget(given) {
  const at = given.lastIndexOf("@");
  const percent = at > 0 ? given.slice(at + 1) : "";
  if (!PERCENTS.includes(percent)) return { key: given, job_id: given, checkpoint: "latest" };
  return { key: given, job_id: given.slice(0, at), checkpoint: percent === "latest" ? percent : Number(percent) };
}

/** A seed for all columns of one run, where none was asked for. */
const drawSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

export default function Generate() {
  const { query } = route.value;
  useTitle(t("generate.title"));
  const mode = MODES.includes(query.mode) ? query.mode : "continue";
  const jobs = useData((abort) => get("/jobs", { limit: 100 }, { signal: abort }), []);
  const { data: fields } = useData(() => fieldsOf("GenerateRequest"), []);
  const usable = jobs.data?.data.filter((job) => job.figures) ?? [];
  const given = [...queryList("checkpoint"), ...queryList("job")];
  const names = given.length ? given : usable.slice(0, 1).map((job) => job.id);
  const targets = useMemo(() => names.map(parseTarget), [names.join()]);
  const titles = useMemo(() => new Map(usable.map((job) => [job.id, job.name ?? job.id.slice(0, 13)])), [jobs.data]);
  const [prompt, setPrompt] = useState(query.prompt ?? t("generate.prompt_default"));
  const [run, setRun] = useState(null);
  const sampling = samplingOf(query, fields);

  const start = (seed) => {
    if (!prompt || !targets.length || !fields || sampling.faults.size) return;
    const used = seed ?? sampling.values.seed ?? drawSeed();
    setQuery({ prompt: prompt.length <= LONGEST_IN_ADDRESS ? prompt : null, run: used });
    setRun({ number: (run?.number ?? 0) + 1, mode, prompt, targets, body: { ...sampling.values, seed: used } });
  };
  // Somebody who was sent the address sees what the sender saw.
  const isReady = Boolean(fields && targets.length);
  const isSent = useRef(query.run !== undefined);
  useEffect(() => {
    if (!isReady || !isSent.current) return;
    isSent.current = false;
    start(Number(query.run));
  }, [isReady]);
  const percentOf = ({ checkpoint }) => (checkpoint === "latest" ? t("generate.latest") : `${checkpoint} %`);
  const titleOf = (target) => `${titles.get(target.job_id) ?? target.job_id} · ${percentOf(target)}`;
  const shown = run?.mode === mode ? run : null;
  // Columns of a single job differ in their percent alone.
  const isOneJob = new Set(shown?.targets.map(({ job_id }) => job_id)).size === 1 && shown.targets.length > 1;
  const columnOf = (target) => (isOneJob ? percentOf(target) : titleOf(target));

  return html`
    <h1>${t("generate.title")}</h1>
    <div class="ways" role="group" aria-label=${t("generate.what")}>
      ${MODES.map((one) => html`<button key=${one} type="button" aria-pressed=${one === mode} onClick=${() => setQuery({ mode: one === "continue" ? null : one })}>${t(`generate.mode.${one}`)}</button>`)}
      <span class="muted">${t(`generate.mode_note.${mode}`)}</span>
    </div>
    <${ErrorBox} error=${jobs.error} />
    ${jobs.data && !usable.length && !given.length && html`<p class="muted">${t("generate.no_jobs")}</p>`}
    <form class="ask card" onSubmit=${(event) => {
      event.preventDefault();
      start();
    }}>
      <${Targets} targets=${targets} names=${names} usable=${usable} titleOf=${titleOf} />
      <label class="field"><span>${t(mode === "continue" ? "generate.prompt" : "generate.text")}</span>
        <textarea rows="3" value=${prompt} onInput=${(event) => setPrompt(event.target.value)}
          onKeyDown=${(event) => {
            if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
              event.preventDefault();
              start();
            }
          }}></textarea></label>
      ${mode === "continue" && fields && html`<${Sampling} fields=${fields} sampling=${sampling} />`}
      <div class="actions">
        <button class="primary" disabled=${!prompt || !targets.length || sampling.faults.size > 0}>${t(`generate.go.${mode}`)}</button>
        <span class="muted">${t("generate.keys")}</span>
      </div>
    </form>
    ${shown && mode === "continue" && html`<${Continuations} run=${shown} titleOf=${columnOf} />`}
    ${shown && mode === "score" && html`<${Scores} run=${shown} titleOf=${columnOf} />`}
    ${shown && mode === "inspect" && html`<${Inspection} run=${shown} titleOf=${columnOf} />`}
  `;
}

/** The sampling fields that the address names: `{texts, values, faults}`. */
function samplingOf(query, fields) {
  const found = { texts: {}, values: {}, faults: new Map() };
  for (const name of SAMPLING) {
    const text = query[name] ?? "";
    found.texts[name] = text;
    if (!fields || text === "") continue;
    try {
      found.values[name] = parse(fields[name], text);
    } catch (error) {
      found.faults.set(name, error.message);
    }
  }
  return found;
}

function Sampling({ fields, sampling }) {
  return html`<div class="sampling">
    ${SAMPLING.map((name) => {
      const field = fields[name];
      const fault = sampling.faults.get(name);
      return html`<div class="field" key=${name}>
        <span><label for=${`sampling-${name}`}>${name}</label> <${Help} text=${field.help} label=${name} /></span>
        <input id=${`sampling-${name}`} inputmode="decimal" value=${sampling.texts[name]}
          placeholder=${field.default === null ? (name === "seed" ? t("generate.drawn") : "null") : String(field.default)}
          aria-invalid=${fault ? "true" : null} aria-describedby=${fault ? `fault-${name}` : null}
          onInput=${(event) => setQuery({ [name]: event.target.value })} />
        ${fault && html`<small id=${`fault-${name}`} class="refused">${bounds(field) || t("generate.not_a_number")}</small>`}
      </div>`;
    })}
  </div>`;
}

/** The checkpoints that are asked, and a field to add others. */
function Targets({ targets, names, usable, titleOf }) {
  const [job, setJob] = useState("");
  const [percent, setPercent] = useState("latest");
  const choose = (list) => setQuery({ checkpoint: [...new Set(list)], job: null });
  const add = () => {
    if (!job.trim()) return;
    // A name is turned into the id that it stands for, so that the address goes on meaning this job.
    const id = usable.find((one) => one.name === job.trim())?.id ?? job.trim();
    choose([...names, `${id}@${percent}`]);
    setJob("");
  };
  const quarters = () => choose(["0", "25", "50", "75", "100"].map((one) => `${targets[0].job_id}@${one}`));
  return html`<div class="targets">
    <ul aria-label=${t("generate.checkpoints")}>
      ${targets.map(
        (target) => html`<li key=${target.key}>
          <span>${titleOf(target)}</span>
          ${targets.length > 1 && html`<button type="button" class="plain small" aria-label=${t("generate.remove", { name: titleOf(target) })}
            onClick=${() => choose(names.filter((name) => name !== target.key))}>×</button>`}
        </li>`,
      )}
    </ul>
    <span class="actions">
      <input list="jobs-to-ask" aria-label=${t("generate.job")} placeholder=${t("generate.job")} value=${job}
        onInput=${(event) => setJob(event.target.value)}
        onKeyDown=${(event) => {
          if (event.key !== "Enter") return;
          event.preventDefault();
          add();
        }} />
      <datalist id="jobs-to-ask">${usable.map((one) => html`<option key=${one.id} value=${one.name ?? one.id}>${one.id.slice(0, 13)}</option>`)}</datalist>
      <select aria-label=${t("generate.checkpoint")} value=${percent} onChange=${(event) => setPercent(event.target.value)}>
        ${PERCENTS.map((one) => html`<option key=${one} value=${one}>${one === "latest" ? t("generate.latest") : `${one} %`}</option>`)}
      </select>
      <button type="button" disabled=${!job.trim()} onClick=${add}>${t("generate.add")}</button>
      ${targets.length > 0 && html`<button type="button" onClick=${quarters}>${t("generate.all_quarters")}</button>`}
      ${targets.length > 1 && html`<button type="button" class="plain" onClick=${() => choose(names.slice(0, 1))}>${t("generate.only_first")}</button>`}
    </span>
  </div>`;
}
