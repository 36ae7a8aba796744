/** Tokens that hold only a part of a character, and the characters that they make together. */

/** What stands where a token holds only a part of a character. */
const BROKEN = "\ufffd";

/** Whether some token cannot be shown by itself. */
export const hasBroken = (tokens, text) => tokens.some((token) => text(token).includes(BROKEN));

/**
 * Tokens as `{text, tokens}`: one each, and those together that share a character.
 *
 * `bytes`: the text that the offsets of the tokens, `byte_offset`, are those of, in UTF-8, up to the last token's end.
 */
export function groupsOf(tokens, bytes) {
  const groups = [];
  for (const token of tokens) {
    const isInside = (bytes[token.byte_offset] & 0xc0) === 0x80;
    if (groups.length && isInside) groups[groups.length - 1].push(token);
    else groups.push([token]);
  }
  const decoder = new TextDecoder();
  const startOf = (index) => groups[index]?.[0].byte_offset ?? bytes.length;
  return groups.map((group, index) => ({ text: decoder.decode(bytes.subarray(startOf(index), startOf(index + 1))), tokens: group }));
}
