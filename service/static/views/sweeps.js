/** All sweeps, newest first, and the ready experiments. */
import { html } from "htm/preact";
import { get, mayChange } from "../api.js";
import { ago, count } from "../format.js";
import { t } from "../i18n.js";
import { ErrorBox, OnlyReads, Section, Skeleton, Status, useData, useTitle } from "../parts/basics.js";
import { PresetList, usePresets } from "../parts/presets.js";
import { SweepActions, sizeOf, variesText } from "../parts/sweep_controls.js";
import { href, navigate, route } from "../router.js";

export default function Sweeps() {
  const { cursor } = route.value.query;
  useTitle(t("sweeps.title"));
  const { data, error, reload } = useData((abort) => get("/sweeps", { cursor }, { signal: abort }), [cursor], { every: 3 });
  const presets = usePresets();
  return html`
    <div class="sweep-head">
      <h1>${t("sweeps.title")}</h1>
      <span class="actions">
        <a class="button" href=${href(["compare"])}>${t("sweeps.compare_others")}</a>
        ${mayChange() && html`<a class="button primary" href=${href(["new"])}>${t("sweeps.new")}</a>`}
      </span>
    </div>
    <p class="lead">${t("sweeps.what")}</p>
    <${ErrorBox} error=${error} />
    ${!data && !error && html`<${Skeleton} lines="8" />`}
    ${data?.data.length === 0 && html`<p class="muted">${t("sweeps.none")}</p>`}
    ${data?.data.length > 0 && html`<div class="scroll" tabindex="0" role="group" aria-label=${t("sweeps.title")}><${Table} sweeps=${data.data} reload=${reload} /></div>`}
    <p class="actions">
      ${cursor && html`<a href=${href(["sweeps"])}>${t("sweeps.newest")}</a>`}
      ${data?.next_cursor && html`<a href=${href(["sweeps"], { cursor: data.next_cursor })}>${t("sweeps.older")}</a>`}
    </p>
    <${Section} title=${t("sweeps.presets")}>
      <${OnlyReads} />
      <${PresetList} presets=${presets} onRun=${(sweep) => navigate(href(["sweeps", sweep.id]))} />
    <//>
  `;
}

const Table = ({ sweeps, reload }) => html`<table class="sweeps">
  <thead>
    <tr>
      <th>${t("sweeps.name")}</th><th>${t("sweeps.status")}</th><th class="number">${t("sweeps.jobs")}</th>
      <th>${t("sweeps.varies")}</th><th>${t("sweeps.created")}</th><th><span class="hidden">${t("sweeps.actions")}</span></th>
    </tr>
  </thead>
  <tbody>
    ${sweeps.map(
      (sweep) => html`<tr key=${sweep.id}>
        <td class="name"><a href=${href(["sweeps", sweep.id])}>${sweep.name ?? sweep.id.slice(0, 13)}</a></td>
        <td><${Status} status=${sweep.status} /></td>
        <td class="number">${count(sizeOf(sweep))}</td>
        <td class="varies">${variesText(sweep)}</td>
        <td class="when">${ago(sweep.created_at)}</td>
        <td><${SweepActions} sweep=${sweep} onDone=${reload} onDeleted=${reload} small=${true} /></td>
      </tr>`,
    )}
  </tbody>
</table>`;
