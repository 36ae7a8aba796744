/** The curves of a job: loss or perplexity with the checkpoints' own and the baselines; learning rate; gradient norm. */
import { html } from "htm/preact";
import { useEffect, useMemo, useState } from "preact/hooks";
import { get } from "../../api.js";
import { Curves, envelope } from "../../charts/curves.js";
import { count, figure } from "../../format.js";
import { t } from "../../i18n.js";
import { Help, Section } from "../../parts/basics.js";
import { route, setQuery } from "../../router.js";

const STRETCHES = 260;

/** The step series of what is zoomed into, as finely as all of it is drawn. */
function useSteps(job, metrics, range) {
  const [part, setPart] = useState(null);
  const isThinned = metrics && job.progress.step > metrics.steps.step.length;
  const key = range && isThinned ? range.join() : null;
  useEffect(() => {
    if (!key) return setPart(null);
    const aborter = new AbortController();
    const [from_step, to_step] = range;
    get(`/jobs/${job.id}/metrics`, { points: 1500, from_step, to_step, tokens: "false" }, { signal: aborter.signal }).then(
      ({ steps }) => setPart({ key, steps }),
      () => {}, // what was read of the whole stays
    );
    return () => aborter.abort();
  }, [job.id, key]);
  return part && part.key === key ? part.steps : metrics?.steps;
}

function inside(steps, name, range) {
  if (!range) return { x: steps.step, y: steps[name] };
  const kept = steps.step.map((step, i) => i).filter((i) => steps.step[i] >= range[0] && steps.step[i] <= range[1]);
  return { x: kept.map((i) => steps.step[i]), y: kept.map((i) => steps[name][i]) };
}

function band(steps, name, range, value = (y) => y) {
  const { x, y } = inside(steps, name, range);
  const found = envelope(x, y.map((one) => (one === null ? null : value(one))), STRETCHES);
  return { x: found.x, y: found.middle, low: found.low, high: found.high };
}

export function CurvesPart({ job, metrics }) {
  const { query } = route.value;
  const range = query.steps ? query.steps.split("-").map(Number) : null;
  const isPerplexity = query.y === "perplexity";
  const [logX, logY] = [query.logx === "1", query.logy !== "0"];
  const steps = useSteps(job, metrics, range);
  const checkpoints = metrics?.checkpoints ?? [];
  const newest = checkpoints[checkpoints.length - 1];

  const loss = useMemo(() => {
    if (!steps) return [];
    const value = isPerplexity ? Math.exp : (y) => y;
    const dots = (name, label, color) => {
      const measured = checkpoints.filter((one) => typeof one[name] === "number" && (one.step > 0 || !logX));
      return { label, color, dots: true, x: measured.map((one) => one.step), y: measured.map((one) => value(one[name])) };
    };
    const series = [
      { label: t(isPerplexity ? "job.train_perplexity" : "job.train_loss"), color: "series-0", ...band(steps, "train_loss", range, value) },
      dots("loss", t(isPerplexity ? "job.perplexity_of_text" : "job.loss_of_text"), "series-1"),
    ];
    if (checkpoints.some((one) => typeof one.val_loss === "number")) {
      series.push(dots("val_loss", t(isPerplexity ? "job.val_perplexity" : "job.val_loss"), "series-2"));
    }
    return series;
  }, [steps, metrics, isPerplexity, query.steps, logX, document.documentElement.lang]);
  const rate = useMemo(() => (steps ? [{ label: t("job.lr"), color: "series-0", ...band(steps, "lr", range) }] : []), [steps, query.steps]);
  const gradient = useMemo(() => (steps ? [{ label: t("job.grad_norm"), color: "series-0", ...band(steps, "grad_norm", range) }] : []), [steps, query.steps]);
  const lines = useMemo(
    () =>
      query.baselines !== "0" && newest?.baselines
        ? ["uniform", "unigram", "bigram"].map((name) => ({
            label: `${t(`job.baseline.${name}`)} ${figure(isPerplexity ? Math.exp(newest.baselines[name]) : newest.baselines[name], 3)}`,
            y: isPerplexity ? Math.exp(newest.baselines[name]) : newest.baselines[name],
          }))
        : [],
    [newest?.percent, isPerplexity, query.baselines, document.documentElement.lang],
  );

  const zoom = (ends) => setQuery({ steps: ends ? ends.join("-") : null });
  const shared = { logX, range, onZoom: zoom, sync: `job-${job.id}` };
  const press = (isOn, name, changes) => html`<button class="small" aria-pressed=${isOn} onClick=${() => setQuery(changes)}>${name}</button>`;
  const actions = html`<div class="actions">
    ${press(!isPerplexity, t("job.loss"), { y: null })} ${press(isPerplexity, t("job.perplexity"), { y: "perplexity" })}
    <span class="gap"></span>
    ${press(logX, t("job.log_x"), { logx: logX ? null : 1 })} ${press(logY, t("job.log_y"), { logy: logY ? "0" : null })}
    ${press(query.baselines !== "0", t("job.baselines"), { baselines: query.baselines === "0" ? null : "0" })}
    ${range && html`<button class="small" onClick=${() => zoom(null)}>${t("job.whole")}</button>`}
    <${Help} text=${t("job.curves_help")} label=${t("job.curves")} />
  </div>`;
  return html`<${Section} title=${t("job.curves")} actions=${actions} id="curves">
    ${!steps?.step.length
      ? html`<p class="muted empty">${t("job.no_steps")}</p>`
      : html`<div class="charts">
          <div class="card">
            <${Curves}
              ...${shared}
              label=${t(isPerplexity ? "job.perplexity_chart" : "job.loss_chart", {
                n: count(job.progress.step),
                last: figure(newest && (isPerplexity ? newest.perplexity : newest.loss)),
              })}
              series=${loss}
              lines=${lines}
              logY=${logY}
              height="300"
            />
          </div>
          <div class="card"><${Curves} ...${shared} label=${t("job.lr_chart")} series=${rate} height="118" /></div>
          <div class="card"><${Curves} ...${shared} label=${t("job.grad_chart")} series=${gradient} logY=${logY} height="118" /></div>
        </div>`}
  </${Section}>`;
}
