/** The form that asks for a key, once the service has refused a request without one. */
import { html } from "htm/preact";
import { useState } from "preact/hooks";
import { signIn } from "../api.js";
import { t } from "../i18n.js";

/** Above everything else; the views ask again once they are mounted anew. */
export function SignIn() {
  const [error, setError] = useState(null);
  const submit = async (event) => {
    event.preventDefault();
    try {
      await signIn(new FormData(event.target).get("key").trim());
      location.reload();
    } catch (refused) {
      setError(refused);
    }
  };
  return html`<div class="veil">
    <form class="card sign-in" onSubmit=${submit} aria-labelledby="sign-in">
      <h2 id="sign-in">${t("common.sign_in")}</h2>
      <p class="muted">${t("common.sign_in_why")}</p>
      <label class="field">
        ${t("common.key")}
        <input name="key" type="password" autocomplete="current-password" required autofocus aria-invalid=${error !== null} />
      </label>
      ${error && html`<p class="error" role="alert">${error.status === 401 ? t("common.wrong_key") : error.message}</p>`}
      <button class="primary">${t("common.sign_in")}</button>
    </form>
  </div>`;
}
