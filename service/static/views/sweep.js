/** One sweep: how far it is, what can be done with it, and its jobs side by side. */
import { html } from "htm/preact";
import { useMemo } from "preact/hooks";
import { pick, t } from "../i18n.js";
import { ErrorBox, Skeleton, useTitle } from "../parts/basics.js";
import { Comparison } from "../parts/comparison.js";
import { withCode } from "../parts/inline_code.js";
import { usePresets } from "../parts/presets.js";
import { SweepActions, SweepProgress, useSweep } from "../parts/sweep_controls.js";
import { href, navigate, route } from "../router.js";

export default function Sweep() {
  const id = route.value.path[1];
  // Another address was chosen, and its view is still being loaded.
  return id ? html`<${One} id=${id} />` : null;
}

function One({ id }) {
  const { sweep, error, reload } = useSweep(id);
  const presets = usePresets();
  const selection = useMemo(() => ({ sweep: id }), [id]);
  useTitle(sweep?.name ?? t("sweeps.one"));
  if (!sweep) return html`<${ErrorBox} error=${error} />${!error && html`<${Skeleton} lines="10" />`}`;
  const preset = presets?.find(({ name }) => name === sweep.name);
  return html`
    <div class="sweep-head">
      <h1>${sweep.name ?? t("sweeps.one")}</h1>
      <${SweepActions} sweep=${sweep} onDone=${reload} onDeleted=${() => navigate(href(["sweeps"]))} />
    </div>
    <${SweepProgress} sweep=${sweep} />
    ${preset && html`<p class="look-at"><b>${t("sweeps.look_at")}</b> ${withCode(pick(preset.look_at))}</p>`}
    ${(preset || presets) && html`<${Comparison} selection=${selection} asked=${preset?.compare} />`}
  `;
}
