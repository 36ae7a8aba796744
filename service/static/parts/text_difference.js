/** What of a text is not in another: the longest common subsequence of their words, the rest marked. Knows no page. */

const MOST_WORDS = 600;

const words = (text) => text.match(/\s+|[\p{L}\p{M}\p{N}]+|[^\s\p{L}\p{M}\p{N}]/gu) ?? [];

/**
 * The pieces of `text`, in order: `{text, same}`, `same` saying whether the piece also stands in `truth` at its place. The
 * end of `text` may be cut within a word. Beyond the first 600 words all counts as different from the first difference on.
 */
export function differences(text, truth) {
  const mine = words(text);
  const theirs = words(truth);
  const isSame = new Array(mine.length).fill(false);
  let start = 0;
  while (start < mine.length && fits(mine, theirs, start, start)) start += 1;
  isSame.fill(true, 0, start);
  if (mine.length <= MOST_WORDS) mark(mine.slice(start), theirs.slice(start, start + MOST_WORDS), (i) => (isSame[start + i] = true));
  const pieces = [];
  mine.forEach((word, i) => {
    const last = pieces[pieces.length - 1];
    if (last?.same === isSame[i]) last.text += word;
    else pieces.push({ text: word, same: isSame[i] });
  });
  return pieces;
}

// A text that was cut after so many tokens may end within a word.
const fits = (mine, theirs, i, j) =>
  mine[i] === theirs[j] || (i === mine.length - 1 && theirs[j] !== undefined && theirs[j].startsWith(mine[i]));

function mark(mine, theirs, found) {
  const longest = Array.from({ length: mine.length + 1 }, () => new Uint16Array(theirs.length + 1));
  for (let i = mine.length - 1; i >= 0; i--) {
    for (let j = theirs.length - 1; j >= 0; j--) {
      longest[i][j] = fits(mine, theirs, i, j) ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
    }
  }
  let [i, j] = [0, 0];
  while (i < mine.length && j < theirs.length) {
    if (fits(mine, theirs, i, j)) {
      found(i);
      i += 1;
      j += 1;
    } else if (longest[i + 1][j] >= longest[i][j + 1]) i += 1;
    else j += 1;
  }
}
