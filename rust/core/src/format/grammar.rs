//! Names of formats:
//! `<element>[_g<length>][_s<f32|f16|bf16|i8>][_<rceil|ceil|even>][_<bitmap|2of4|bsr<g>|block<r>x<c>>]`.
use super::{plain_elements, table, Element, Format, ScaleMode, ScaleType};
use crate::sparse::Structure;
use crate::{Error, Result};

fn fail<T>(text: String) -> Result<T> {
    Err(Error::Format(text))
}

/// Cuts what a message quotes: names come from users and files.
fn quote(s: &str) -> String {
    let short: String = s.chars().take(40).collect();
    if short.len() < s.len() {
        format!("{short:?}...")
    } else {
        format!("{short:?}")
    }
}

/// Other names of elements. MSFP is a sign, a magnitude and a shared exponent: `bfp` without the lowest code. Two bits are
/// what vector codes are for.
const ALIASES: [(&str, &str); 3] = [("msfp12", "bfp4"), ("msfp16", "bfp8"), ("vq", "vq2")];

/// Whether a name is an element's, with or without suffixes.
fn starts(name: &str, element: &str) -> bool {
    name.strip_prefix(element).is_some_and(|r| r.is_empty() || r.starts_with('_'))
}

pub(super) fn parse(name: &str) -> Result<Format> {
    let (alias, own) = ALIASES.into_iter().find(|(a, _)| starts(name, a)).unwrap_or(("", ""));
    let spelled = format!("{own}{}", &name[alias.len()..]);
    let parts = &spelled[..];
    // Names of elements may hold underscores: the longest that fits.
    let fits = |e: &&Element| starts(parts, e.name);
    let Some(element) = table().chain(plain_elements()).filter(fits).max_by_key(|e| e.name.len()) else {
        return unknown(name);
    };
    let (mut group, mut scale, mut mode, mut structure) = (None, None, None, None);
    for part in parts[element.name.len()..].split('_').skip(1) {
        if structure.is_some() {
            return fail(format!("format {}: {} after the structure of kept entries", quote(name), quote(part)));
        }
        if let Some(s) = Structure::parse(part) {
            if s.is_none() {
                return fail(format!("format {}: lengths of {} are not numbers from 1 on", quote(name), quote(part)));
            }
            structure = s;
            continue;
        }
        if mode.is_some() {
            return fail(format!("format {}: {} after the scale mode", quote(name), quote(part)));
        }
        mode = ScaleMode::ALL.into_iter().find(|m| m.name() == part);
        if mode.is_some() {
            if element.mantissa.is_none() {
                return fail(format!("format {}: {} has no scale mode {}", quote(name), element.name, quote(part)));
            }
        } else if let Some(digits) = part.strip_prefix('g') {
            if group.is_some() || scale.is_some() {
                return fail(format!("format {}: one group length, before the scale type", quote(name)));
            }
            group = Some(group_length(name, digits)?);
        } else if let Some(t) = part.strip_prefix('s') {
            if scale.is_some() {
                return fail(format!("format {}: two scale types", quote(name)));
            }
            scale = ScaleType::NAMED.into_iter().find(|s| s.name() == t);
            if scale.is_none() {
                return fail(format!("format {}: scale type {} is none of f32, f16, bf16, i8", quote(name), quote(t)));
            }
        } else {
            let modes = if element.mantissa.is_some() { ", a scale mode" } else { "" };
            return fail(format!(
                "format {}: unknown suffix {}; allowed are _g<length>, _s<f32|f16|bf16|i8>{modes}, and _bitmap, _2of4, \
                 _bsr<length> or _block<rows>x<columns>",
                quote(name),
                quote(part)
            ));
        }
    }
    let format = Format::with(element, group, scale)?;
    let format = Format { mode: mode.unwrap_or(ScaleMode::Floor), ..format };
    structure.map_or(Ok(format), |s| format.sparse(s))
}

fn group_length(name: &str, digits: &str) -> Result<u32> {
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return fail(format!("format {}: group length {} is not a number", quote(name), quote(digits)));
    }
    match digits.parse::<u32>() {
        Ok(g) if g < Format::MIN_GROUP => {
            fail(format!("format {}: group length {g} is below {}", quote(name), Format::MIN_GROUP))
        }
        Ok(_) if digits.starts_with('0') => {
            fail(format!("format {}: group length {} starts with a zero", quote(name), quote(digits)))
        }
        Ok(g) => Ok(g),
        Err(_) => fail(format!("format {}: group length {} is above {}", quote(name), quote(digits), u32::MAX)),
    }
}

/// Names that a message lists at most.
const KNOWN: usize = 24;

fn unknown(name: &str) -> Result<Format> {
    let first = name.split("_g").next().unwrap_or("");
    let mut near: Vec<(usize, &str)> = if first.len() <= 16 {
        table().map(|e| (distance(first, e.name), e.name)).filter(|(d, _)| *d <= 2).collect()
    } else {
        Vec::new()
    };
    near.sort_by_key(|(d, _)| *d);
    let names: Vec<&str> = if near.is_empty() {
        table().map(|e| e.name).collect()
    } else {
        near.iter().take(4).map(|(_, n)| *n).collect()
    };
    let lead = if near.is_empty() { "known are" } else { "did you mean" };
    let more = names.len().saturating_sub(KNOWN);
    let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
    let names = names[..names.len() - more].join(", ");
    fail(format!("format {}: unknown element {}; {lead} {names}{rest}", quote(name), quote(first)))
}

/// Edit distance.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.to_lowercase().chars().collect(), b.chars().collect());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
