/** The config of a job: what differs from the reference run first, the rest on request. */
import { html } from "htm/preact";
import { useEffect, useState } from "preact/hooks";
import { knobValue } from "../../format.js";
import { t } from "../../i18n.js";
import { Section } from "../../parts/basics.js";
import { knobHelp } from "../../parts/knob_help.js";
import { changed, knobs } from "../../schema.js";

export function ConfigPart({ job }) {
  const [known, know] = useState(null);
  useEffect(() => {
    knobs().then(know, () => {});
  }, []);
  const different = known ? changed(job.config, known) : {};
  const rest = Object.keys(job.config).filter((name) => !(name in different));
  const row = (name) => html`<tr key=${name}>
    <th scope="row"><code>${name}</code></th>
    <td><b>${knobValue(job.config[name])}</b></td>
    <td class="muted default">${name in different ? t("job.default", { value: knobValue(known[name].default) }) : ""}</td>
    <td class="muted">${known ? knobHelp(known[name]) : ""}</td>
  </tr>`;
  return html`<${Section} title=${t("job.config")} id="config">
    <div class="card config">
      ${known && !Object.keys(different).length && html`<p class="muted">${t("job.is_reference")}</p>`}
      <table><tbody>${Object.keys(different).map(row)}</tbody></table>
      <details>
        <summary>${t("job.rest", { n: rest.length })}</summary>
        <table><tbody>${rest.map(row)}</tbody></table>
      </details>
      ${job.execution &&
      html`<details>
        <summary>${t("job.execution")}</summary>
        <table><tbody>${Object.entries(job.execution).map(
          ([name, value]) => html`<tr key=${name}><th scope="row"><code>${name}</code></th><td><b>${knobValue(value)}</b></td></tr>`,
        )}</tbody></table>
      </details>`}
    </div>
  </${Section}>`;
}
