/** What is left of a job: its events, its files, and the lines that run it again. */
import { html } from "htm/preact";
import { useEffect, useState } from "preact/hooks";
import { get } from "../../api.js";
import { bytes, count, figure, moment } from "../../format.js";
import { t } from "../../i18n.js";
import { Code, Section, Status } from "../../parts/basics.js";
import { changed, knobs } from "../../schema.js";

export function Events({ job, events }) {
  const times = [["submitted", job.created_at], ["started", job.started_at], ["finished", job.finished_at]];
  return html`<${Section} title=${t("job.events")} id="events">
    <div class="card">
      <dl class="times">
        ${times.map(([name, time]) => html`<div key=${name}><dt>${t(`job.${name}`)}</dt><dd>${moment(time)}</dd></div>`)}
        <div><dt>${t("job.attempts")}</dt><dd>${count(job.attempt)}</dd></div>
      </dl>
      <ol class="events">
        ${events.map(
          ({ kind, data }, i) => html`<li key=${i}>
            ${kind === "status" && html`<${Status} status=${data.status} /> ${data.status_reason ?? ""} ${data.error?.code ?? ""}`}
            ${kind === "checkpoint" && html`<b>${data.percent} %</b> ${t("job.step")} ${count(data.step)}, ${t("job.loss")} ${figure(data.loss)}`}
            ${kind === "warning" && html`<b class="warn">${data.code}</b> ${data.message}`}
          </li>`,
        )}
      </ol>
    </div>
  </${Section}>`;
}

export function Downloads({ job, checkpoints }) {
  const [files, setFiles] = useState([]);
  useEffect(() => {
    const aborter = new AbortController();
    get(`/jobs/${job.id}/checkpoints`, {}, { signal: aborter.signal }).then(({ data }) => setFiles(data), () => {});
    return () => aborter.abort();
  }, [job.id, checkpoints.length]);
  const last = files[files.length - 1];
  return html`<${Section} title=${t("job.downloads")} id="downloads">
    <div class="card">
      <p>
        <a href=${`/jobs/${job.id}/metrics.csv`} download=${`${job.id}.csv`}>${t("job.csv")}</a> ·${" "}
        <a href=${`/jobs/${job.id}/text`} download=${`${job.id}.txt`}>${t("job.text_file")}</a>
      </p>
      ${files.map(
        (checkpoint) => html`<details key=${checkpoint.percent}>
          <summary>
            ${checkpoint.percent} % <span class="muted">${bytes(checkpoint.files.reduce((sum, file) => sum + file.size, 0))}</span>
          </summary>
          <ul class="files">
            ${checkpoint.files.map(
              (file) => html`<li key=${file.name}>
                <a href=${`/jobs/${job.id}/checkpoints/${checkpoint.percent}/files/${file.name}`} download=${file.name}>${file.name}</a>${" "}
                <span class="muted" title=${`sha256 ${file.sha256}`}>${bytes(file.size)}</span>
              </li>`,
            )}
          </ul>
        </details>`,
      )}
      ${last && html`<p class="muted">${t("job.export")}</p><${Code} text=${`nanomoe export ${job.id}@${last.percent} --to hf my-model`} label=${t("job.export")} />`}
    </div>
  </${Section}>`;
}

const quoted = (text) => `'${text.replace(/'/g, `'\\''`)}'`;

/** A value as Python writes it. */
function python(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([key, one]) => `${JSON.stringify(key)}: ${python(one)}`).join(", ")}}`;
  return JSON.stringify(value);
}

export function Repeat({ job }) {
  const [known, know] = useState(null);
  useEffect(() => {
    knobs().then(know, () => {});
  }, []);
  if (!known) return null;
  const different = changed(job.config, known);
  const origin = location.origin;
  const curl = [
    `curl -s ${origin}/jobs/${job.id}/text -o text.txt`,
    `curl -s ${origin}/jobs -F text=@text.txt${job.name ? ` -F name=${quoted(job.name)}` : ""} \\`,
    `  -F config=${quoted(JSON.stringify(different))}`,
  ].join("\n");
  const lines = [
    "from service.client import Client",
    "",
    `with Client(${JSON.stringify(origin)}) as client:`,
    `    text = client.job(${JSON.stringify(job.id)}).text()`,
    `    job = client.submit(text, ${python(different)}${job.name ? `, name=${python(job.name)}` : ""})`,
    "    print(job.wait().status, job.metrics().checkpoints[-1].loss)",
  ].join("\n");
  return html`<${Section} title=${t("job.repeat")} id="repeat">
    <p class="muted">${t("job.repeat_why")}</p>
    <div class="two">
      <div><h3>curl</h3><${Code} text=${curl} label="curl" /></div>
      <div><h3>Python</h3><${Code} text=${lines} label="Python" /></div>
    </div>
  </${Section}>`;
}
