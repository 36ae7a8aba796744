/** A sentence of the API in which names stand between backticks, as Markdown has it. */
import { html } from "htm/preact";

export const withCode = (text) => text.split("`").map((part, index) => (index % 2 ? html`<code>${part}</code>` : part));
