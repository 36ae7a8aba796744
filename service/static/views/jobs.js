/** All jobs, newest first: found by status, tag and name, followed live, and several acted upon at once. */
import { html } from "htm/preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { get, mayChange, post, remove, session } from "../api.js";
import { coalesced, follow } from "../events.js";
import { ago, count, duration, figure, knobValue, percent } from "../format.js";
import { t } from "../i18n.js";
import { attempt, Confirm, ErrorBox, loadStyle, notify, Progress, Skeleton, Status, useData, useSettled, useTitle } from "../parts/basics.js";
import { useDifferences } from "../parts/differences.js";
import { Sparkline } from "../parts/sparkline.js";
import { href, route, setQuery } from "../router.js";

await loadStyle("jobs");

const STATUSES = ["queued", "running", "paused", "succeeded", "failed", "cancelled"];
const PAGE = 50;

/** What changes of a job comes as an event, but for its name and tags. */
const SECONDS_BETWEEN_READS = 30;

/** What can be done with jobs, and with which. */
const ACTIONS = {
  pause: { to: (id) => post(`/jobs/${id}/pause`), fits: (status) => status === "queued" || status === "running" },
  resume: { to: (id) => post(`/jobs/${id}/resume`), fits: (status) => status === "paused" },
  cancel: { to: (id) => post(`/jobs/${id}/cancel`), fits: (status) => ["queued", "running", "paused"].includes(status) },
  delete: { to: (id) => remove(`/jobs/${id}`), fits: (status) => ["succeeded", "failed", "cancelled"].includes(status), asks: true },
};

export default function Jobs() {
  useTitle(t("jobs.title"));
  const { status, tag, q, cursor } = route.value.query;
  const filter = { status, tag, q, cursor };
  const { data, error, isStale, reload } = useData(
    (signal) => get("/jobs", { ...filter, limit: PAGE, counts: true }, { signal }),
    [status, tag, q, cursor],
    { every: SECONDS_BETWEEN_READS },
  );
  const jobs = useProgress(data, tag, reload);
  const [chosen, choose] = useState(new Set());
  const selected = jobs.filter((job) => chosen.has(job.id));
  const total = data && Object.values(data.counts).reduce((sum, n) => sum + n, 0);
  const isFiltered = Boolean(status || tag || q);
  return html`
    <div class="jobs-head">
      <h1>${t("jobs.title")}</h1>
      <${session.value?.role === "admin" ? Workers : Nobody} isWaiting=${Boolean(data?.counts.queued || data?.counts.running)} />
      ${mayChange() && html`<a class="button primary" href=${href(["new"])}>${t("jobs.new")}</a>`}
    </div>
    <${Filters} counts=${data?.counts} />
    <${ErrorBox} error=${error} />
    <${Actions} selected=${selected} clear=${() => choose(new Set())} reload=${reload} />
    ${!data && !error && html`<${Skeleton} lines="8" />`}
    ${data && jobs.length > 0 && html`<${Table} jobs=${jobs} isStale=${isStale} chosen=${chosen} choose=${choose} />`}
    ${data && jobs.length === 0 && html`<${Empty} isFiltered=${isFiltered} />`}
    ${data &&
    html`<nav class="pages" aria-label=${t("jobs.pages")}>
      <span class="muted">${t("jobs.total", { n: total, count: count(total) })}</span>
      ${cursor && html`<a href=${href(["jobs"], { ...filter, cursor: null })}>${t("jobs.newest")}</a>`}
      ${data.next_cursor && html`<a href=${href(["jobs"], { ...filter, cursor: data.next_cursor })}>${t("jobs.older")}</a>`}
    </nav>`}
  `;
}

/** The jobs of a page with the progress that events told of since it was read; it is read anew when a status changes. */
function useProgress(data, tag, reload) {
  const [progress, setProgress] = useState({});
  useEffect(() => setProgress({}), [data]);
  const again = useRef(reload);
  again.current = reload;
  useEffect(() => {
    let waiting = {};
    const refresh = coalesced(() => again.current(), 150, (took) => 3 * took);
    const show = coalesced(() => {
      setProgress((before) => ({ ...before, ...waiting }));
      waiting = {};
    }, 250);
    const step = ({ job_id: id, ...rest }) => {
      waiting[id] = rest;
      show();
    };
    const stop = follow("/events", { status: refresh, checkpoint: refresh, step }, { query: { tag }, onReconnect: refresh });
    return () => {
      stop();
      refresh.cancel();
      show.cancel();
    };
  }, [tag]);
  return (data?.data ?? []).map((job) => (progress[job.id] ? { ...job, progress: { ...job.progress, ...progress[job.id] } } : job));
}

function Empty({ isFiltered }) {
  if (isFiltered) return html`<p class="empty">${t("jobs.none_match")} <a href=${href(["jobs"])}>${t("jobs.show_all")}</a></p>`;
  return html`<div class="card empty">
    <p>${t("jobs.none")}</p>
    <p class="actions">
      ${mayChange() && html`<a class="button primary" href=${href(["new"], { example: 1 })}>${t("jobs.try_example")}</a>`}
      <a class="button" href=${href(["sweeps"])}>${t("jobs.experiment")}</a>
      <a class="button" href=${href(["learn"])}>${t("jobs.lesson")}</a>
    </p>
  </div>`;
}

/** In the place of the workers, which only an admin may see. */
const Nobody = () => html`<p class="workers"></p>`;

/** Who trains: devices and free slots, or that nobody is there. */
function Workers({ isWaiting }) {
  const { data } = useData((signal) => get("/workers", {}, { signal }), [], { every: 5 });
  if (!data) return html`<p class="workers muted"></p>`;
  const newest = Math.max(...data.data.map((worker) => Date.parse(worker.last_seen_at)), 0);
  // By the service's clock: the browser's may be another.
  const alive = data.data.filter((one) => !one.stopped_at && newest - Date.parse(one.last_seen_at) < 60_000);
  if (!alive.length) return html`<p class=${`workers ${isWaiting ? "lacking" : "muted"}`}>${t("jobs.no_worker")}</p>`;
  const slots = alive.reduce((sum, one) => sum + one.slots, 0);
  const busy = alive.reduce((sum, one) => sum + one.busy_slots, 0);
  const devices = [...new Set(alive.flatMap((one) => one.devices.map(({ device, name }) => name ?? device)))];
  return html`<p class="workers muted" title=${devices.join(", ")}>
    ${t("jobs.workers", { n: alive.length })} · ${devices.join(", ")} · ${t("jobs.slots", { busy, slots })}
  </p>`;
}

function Filters({ counts }) {
  const { status, tag, q } = route.value.query;
  const [typed, type] = useState(q ?? "");
  const settled = useSettled(typed.trim());
  const field = useRef();
  useEffect(() => {
    if (settled !== (route.value.query.q ?? "")) setQuery({ q: settled || null, cursor: null });
  }, [settled]);
  useEffect(() => {
    const focus = (event) => {
      if (event.key !== "/" || event.target.closest?.("input, textarea, select")) return;
      event.preventDefault();
      field.current.focus();
    };
    addEventListener("keydown", focus);
    return () => removeEventListener("keydown", focus);
  }, []);
  const all = counts && Object.values(counts).reduce((sum, n) => sum + n, 0);
  const tab = (name, n) => html`<a
    href=${href(["jobs"], { tag, q, status: name })}
    aria-current=${(status ?? null) === name ? "true" : null}
    class=${n === 0 ? "none" : null}
  >
    ${name ? t(`common.status.${name}`) : t("jobs.all")} <span class="n">${counts ? count(n) : ""}</span>
  </a>`;
  return html`<div class="filters">
    <nav class="tabs" aria-label=${t("jobs.by_status")}>${tab(null, all)} ${STATUSES.map((one) => tab(one, counts?.[one]))}</nav>
    <form role="search" onSubmit=${(event) => event.preventDefault()}>
      ${tag &&
      html`<a class="chip" href=${href(["jobs"], { status, q })} aria-label=${t("jobs.without_tag", { tag })}>${tag} <b aria-hidden="true">✕</b></a>`}
      <input
        ref=${field}
        type="search"
        value=${typed}
        onInput=${(event) => type(event.target.value)}
        placeholder=${t("jobs.search")}
        aria-label=${t("jobs.search")}
      />
    </form>
  </div>`;
}

function Actions({ selected, clear, reload }) {
  const [asked, ask] = useState(null);
  if (!selected.length) return null;
  const perform = async (name, jobs) => {
    let done = 0;
    for (const job of jobs) if (await attempt(() => ACTIONS[name].to(job.id))) done += 1;
    if (done) notify(t(`jobs.done.${name}`, { n: done }));
    if (name === "delete") clear();
    reload();
  };
  return html`<div class="selection actions" role="group" aria-label=${t("jobs.selected", { n: selected.length })}>
    <span>${t("jobs.selected", { n: selected.length })}</span>
    ${Object.entries(mayChange() ? ACTIONS : {}).map(([name, { fits, asks }]) => {
      const fitting = selected.filter((job) => fits(job.status));
      const act = () => (asks ? ask({ name, fitting }) : perform(name, fitting));
      return html`<button class=${`small ${asks ? "danger" : ""}`} disabled=${!fitting.length} onClick=${act}>
        ${t(`jobs.action.${name}`)}${fitting.length && fitting.length < selected.length ? ` (${fitting.length})` : ""}
      </button>`;
    })}
    <a class="button small" href=${href(["compare"], { job: selected.map((job) => job.id) })}>${t("jobs.compare")}</a>
    <button class="small plain" onClick=${clear}>${t("jobs.clear")}</button>
    ${asked &&
    html`<${Confirm}
      title=${t("jobs.delete_title", { n: asked.fitting.length })}
      text=${t("jobs.delete_text")}
      action=${t("jobs.action.delete")}
      onConfirm=${() => perform(asked.name, asked.fitting)}
      onClose=${() => ask(null)}
    />`}
  </div>`;
}

function Table({ jobs, isStale, chosen, choose }) {
  const curves = useCurves(jobs);
  const differences = useDifferences();
  const every = jobs.every((job) => chosen.has(job.id));
  const toggle = (ids, isOn) => {
    const next = new Set(chosen);
    for (const id of ids) next[isOn ? "add" : "delete"](id);
    choose(next);
  };
  return html`<table class=${`jobs ${isStale ? "stale" : ""}`}>
    <thead>
      <tr>
        <th>
          <input
            type="checkbox"
            checked=${every}
            aria-label=${t("jobs.select_all")}
            onChange=${(event) => toggle(jobs.map((job) => job.id), event.target.checked)}
          />
        </th>
        <th>${t("jobs.status")}</th>
        <th>${t("jobs.name")}</th>
        <th>${t("jobs.progress")}</th>
        <th>${t("jobs.curve")}</th>
        <th class="number">${t("jobs.loss")}</th>
        <th class="number">${t("jobs.perplexity")}</th>
        <th class="number">${t("jobs.created")}</th>
      </tr>
    </thead>
    <tbody>
      ${jobs.map(
        (job) => html`<${Row}
          key=${job.id}
          job=${job}
          curve=${curves.get(job.id)}
          differences=${differences(job.config)}
          isChosen=${chosen.has(job.id)}
          toggle=${(isOn) => toggle([job.id], isOn)}
        />`,
      )}
    </tbody>
  </table>`;
}

function Row({ job, curve, differences, isChosen, toggle }) {
  const name = job.name ?? job.id.slice(0, 12);
  return html`<tr class=${isChosen ? "chosen" : ""}>
    <td class="check">
      <input type="checkbox" checked=${isChosen} aria-label=${t("jobs.select", { name })} onChange=${(e) => toggle(e.target.checked)} />
    </td>
    <td class="state"><${Status} status=${job.status} /></td>
    <td class="name">
      <a href=${href(["jobs", job.id])} class=${job.name ? "" : "mono"} title=${name}>${name}</a>
      <${Tags} tags=${job.tags} />
      <div class="knobs">
        ${Object.entries(differences).map(([knob, value]) => html`<span key=${knob}>${knob} <b>${knobValue(value)}</b></span> `)}
      </div>
    </td>
    <td class="progress"><${Place} job=${job} /></td>
    <td class="curve"><${Sparkline} curve=${curve} label=${t("jobs.curve_of", { name })} /></td>
    <td class="number" data-label=${t("jobs.loss")}>${figure(job.figures?.loss)}</td>
    <td class="number" data-label=${t("jobs.perplexity")}>${figure(job.figures?.perplexity)}</td>
    <td class="number muted created" title=${job.created_at}>${ago(job.created_at)}</td>
  </tr>`;
}

const Tags = ({ tags }) =>
  Object.entries(tags)
    .filter(([key]) => key !== "sweep")
    .map(([key, value]) => {
      const tag = value ? `${key}=${value}` : key;
      return html`<a class="chip" key=${key} href=${href(["jobs"], { tag })}>${tag}</a> `;
    });

/** How far a job is, and what is to be said of that. */
function Place({ job }) {
  const { progress, status } = job;
  if (status === "failed") return html`<span class="reason bad">${job.error?.code ?? job.status_reason}</span>`;
  if (status === "queued") return html`<span class="reason muted">${job.status_reason ?? t("jobs.waits")}</span>`;
  const steps = progress.total_steps === null ? "" : `${count(progress.step)} / ${count(progress.total_steps)}`;
  if (status === "succeeded") {
    const seconds = (Date.parse(job.finished_at) - Date.parse(job.started_at)) / 1000;
    return html`<span class="reason muted">${t("jobs.took", { steps: count(progress.step), time: duration(seconds) })}</span>`;
  }
  return html`<${Progress} percent=${progress.percent} label=${t("jobs.progress")} />
    <span class="reason muted">
      ${percent(progress.percent / 100)} · ${steps}
      ${status === "running" && progress.eta_seconds !== null ? ` · ${t("jobs.left", { time: duration(progress.eta_seconds) })}` : ""}
    </span>`;
}

/** The loss curves of the jobs on the page, asked for again only where a job has gone on since. */
function useCurves(jobs) {
  const kept = useRef(new Map());
  const [, setN] = useState(0);
  const steps = jobs.map((job) => `${job.id}:${job.progress.step}`).join();
  useEffect(() => {
    const missing = jobs.filter((job) => job.progress.step > 0 && kept.current.get(job.id)?.last_step !== job.progress.step);
    if (!missing.length) return undefined;
    const aborter = new AbortController();
    get("/compare/series", { job: missing.map((job) => job.id), points: 40 }, { signal: aborter.signal }).then(
      ({ jobs: found }) => {
        for (const curve of found) kept.current.set(curve.job_id, curve);
        setN((n) => n + 1);
      },
      () => {}, // the list itself says what is wrong, and asks again
    );
    return () => aborter.abort();
  }, [steps]);
  return kept.current;
}
