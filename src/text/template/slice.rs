//! Which items a slice takes, by Python's rules.

/// `text[start:stop:step]`, in characters.
pub(super) fn sliced_text(text: &str, start: Option<i64>, stop: Option<i64>, step: i64) -> String {
    if text.is_ascii() {
        let bytes = text.as_bytes();
        return places(bytes.len(), start, stop, step)
            .map(|at| char::from(bytes[at]))
            .collect();
    }
    if step == 1 {
        let places = places(text.chars().count(), start, stop, 1);
        let (skipped, kept) = (places.clone().next().unwrap_or(0), places.count());
        return text.chars().skip(skipped).take(kept).collect();
    }
    let characters: Vec<char> = text.chars().collect();
    places(characters.len(), start, stop, step)
        .map(|at| characters[at])
        .collect()
}

/// The indices of `[start:stop:step]` in a sequence of length `len`.
pub(super) fn places(
    len: usize,
    start: Option<i64>,
    stop: Option<i64>,
    step: i64,
) -> impl Iterator<Item = usize> + Clone {
    let len = len as i64;
    let (low, high) = if step > 0 { (0, len) } else { (-1, len - 1) };
    let clamp = |at: i64| {
        if at < 0 {
            (at + len).max(low)
        } else {
            at.min(high)
        }
    };
    let (first, last) = if step > 0 { (low, high) } else { (high, low) };
    let (first, last) = (start.map_or(first, clamp), stop.map_or(last, clamp));
    let distance = if step > 0 { last - first } else { first - last };
    let width = step.unsigned_abs();
    let count = (distance.max(0) as u64).div_ceil(width);
    (0..count).map(move |n| {
        let moved = (n * width) as i64;
        (if step > 0 {
            first + moved
        } else {
            first - moved
        }) as usize
    })
}
