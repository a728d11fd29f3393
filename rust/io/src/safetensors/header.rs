//! The header: parsing with limits, checking, laying out.
use super::{Dtype, MAX_DIMS, MAX_HEADER, MAX_METADATA, MAX_NAME, MAX_TENSORS, MAX_TEXT, METADATA};
use crate::error::{Error, Result};
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::cell::RefCell;
use std::fmt;
use std::io::Read;

/// What a tensor will be, before it has a place in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
}

impl Spec {
    /// Bytes of the data.
    ///
    /// # Errors
    /// If the product does not fit 64 bits or does not end at a byte.
    pub fn nbytes(&self) -> Result<u64> {
        let bits = self
            .shape
            .iter()
            .try_fold(u64::from(self.dtype.bits()), |n, &d| n.checked_mul(d))
            .ok_or_else(|| Error::SizeOverflow { name: self.name.clone() })?;
        if bits % 8 != 0 {
            return Err(Error::PartialByte { name: self.name.clone() });
        }
        Ok(bits / 8)
    }
}

/// A tensor with its place: bytes `begin..end` of the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Name, type and shape.
    pub spec: Spec,
    /// First byte.
    pub begin: u64,
    /// One past the last byte.
    pub end: u64,
}

impl Tensor {
    /// Bytes of the data.
    pub fn nbytes(&self) -> u64 {
        self.end - self.begin
    }
}

/// A checked header: the tensors tile the data without gap or overlap, names are distinct, sizes agree with shapes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Header {
    /// In the order of their data.
    tensors: Vec<Tensor>,
    /// Positions in `tensors`, ordered by name.
    by_name: Vec<u32>,
    /// Ordered by key.
    metadata: Vec<(String, String)>,
}

impl Header {
    /// Parses and checks the JSON text of a header that describes `data` bytes.
    ///
    /// The text is read as it is parsed and never held whole: names and metadata alone may fill a header, and would
    /// then be in memory twice. Give a buffered source.
    ///
    /// # Errors
    /// [`Error::Io`], and one variant of [`Error`] for each way the text can be wrong.
    pub fn parse(mut json: impl Read, data: u64) -> Result<Self> {
        let mut first = [0];
        if json.read(&mut first)? == 0 || first != *b"{" {
            return Err(Error::Json("it does not begin with '{'".into()));
        }
        let cx = Cx { fault: RefCell::new(None) };
        let mut de = serde_json::Deserializer::from_reader(first.chain(json));
        let parsed = HeaderSeed(&cx).deserialize(&mut de).and_then(|h| de.end().map(|()| h));
        let (tensors, metadata) = match (parsed, cx.fault.into_inner()) {
            (_, Some(fault)) => return Err(fault),
            (Err(e), None) if e.is_io() => return Err(Error::Io(e.into())),
            (Err(e), None) => return Err(Error::Json(e.to_string())),
            (Ok(h), None) => h,
        };
        Self::checked(tensors, metadata, data)
    }

    /// Gives each tensor its place: wider types first, so that each begins aligned to its element; else in the order
    /// given.
    ///
    /// # Errors
    /// If a limit is exceeded, names collide or a size overflows.
    pub fn layout(mut specs: Vec<Spec>, metadata: Vec<(String, String)>) -> Result<Self> {
        if specs.len() > MAX_TENSORS {
            return Err(Error::TooManyTensors);
        }
        if metadata.len() > MAX_METADATA {
            return Err(Error::TooManyMetadata);
        }
        if let Some((key, value)) = metadata.iter().find(|(k, v)| k.len() > 2 * MAX_NAME || v.len() > MAX_TEXT) {
            return Err(Error::TextTooLong { len: key.len().max(value.len()) });
        }
        for spec in &specs {
            if spec.name == METADATA {
                return Err(Error::ReservedName(spec.name.clone()));
            }
            if spec.name.len() > MAX_NAME {
                return Err(Error::TextTooLong { len: spec.name.len() });
            }
            if spec.shape.len() > MAX_DIMS {
                return Err(Error::TooManyDims { name: spec.name.clone() });
            }
        }
        specs.sort_by_key(|s| std::cmp::Reverse(s.dtype.alignment()));
        let mut tensors = Vec::with_capacity(specs.len());
        let mut at = 0u64;
        for spec in specs {
            let end = at.checked_add(spec.nbytes()?).ok_or_else(|| Error::SizeOverflow { name: spec.name.clone() })?;
            tensors.push(Tensor { spec, begin: at, end });
            at = end;
        }
        Self::checked(tensors, metadata, at)
    }

    fn checked(mut tensors: Vec<Tensor>, mut metadata: Vec<(String, String)>, data: u64) -> Result<Self> {
        for t in &tensors {
            if t.begin > t.end {
                return Err(Error::OffsetsReversed { name: t.spec.name.clone() });
            }
            let shape = t.spec.nbytes()?;
            if shape != t.nbytes() {
                return Err(Error::SizeMismatch { name: t.spec.name.clone(), shape, offsets: t.nbytes() });
            }
        }
        tensors.sort_by_key(|t| (t.begin, t.end));
        let mut at = 0;
        for t in &tensors {
            match t.begin.cmp(&at) {
                std::cmp::Ordering::Less => return Err(Error::Overlap { name: t.spec.name.clone() }),
                std::cmp::Ordering::Greater => return Err(Error::Hole { name: t.spec.name.clone() }),
                std::cmp::Ordering::Equal => at = t.end,
            }
        }
        if at > data {
            return Err(Error::Truncated { need: at, have: data });
        }
        if at < data {
            return Err(Error::TrailingBytes { extra: data - at });
        }
        let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
        by_name.sort_by(|&a, &b| tensors[a as usize].spec.name.cmp(&tensors[b as usize].spec.name));
        if let Some(w) =
            by_name.windows(2).find(|w| tensors[w[0] as usize].spec.name == tensors[w[1] as usize].spec.name)
        {
            return Err(Error::DuplicateName(tensors[w[0] as usize].spec.name.clone()));
        }
        metadata.sort();
        if let Some(w) = metadata.windows(2).find(|w| w[0].0 == w[1].0) {
            return Err(Error::DuplicateField { name: METADATA.into(), field: w[0].0.clone() });
        }
        Ok(Self { tensors, by_name, metadata })
    }

    /// The tensors, in the order of their data.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The entries of `__metadata__`, ordered by key.
    pub fn metadata(&self) -> &[(String, String)] {
        &self.metadata
    }

    /// Bytes of data.
    pub fn data_len(&self) -> u64 {
        self.tensors.last().map_or(0, |t| t.end)
    }

    /// The place of a tensor in [`Header::tensors`].
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn position(&self, name: &str) -> Result<usize> {
        self.by_name
            .binary_search_by(|&i| self.tensors[i as usize].spec.name.as_str().cmp(name))
            .map(|i| self.by_name[i] as usize)
            .map_err(|_| Error::NoSuchTensor(name.into()))
    }

    /// The bytes a file begins with: length field, JSON, spaces up to a multiple of 8.
    ///
    /// # Errors
    /// [`Error::HeaderTooLarge`].
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut out = vec![0u8; 8];
        out.push(b'{');
        if !self.metadata.is_empty() {
            push_json(&mut out, METADATA);
            out.extend_from_slice(b":{");
            for (i, (k, v)) in self.metadata.iter().enumerate() {
                if i > 0 {
                    out.push(b',');
                }
                push_json(&mut out, k);
                out.push(b':');
                push_json(&mut out, v);
            }
            out.push(b'}');
        }
        for t in &self.tensors {
            if out.len() > 9 {
                out.push(b',');
            }
            push_json(&mut out, &t.spec.name);
            let shape: Vec<String> = t.spec.shape.iter().map(u64::to_string).collect();
            out.extend_from_slice(
                format!(
                    r#":{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}}"#,
                    t.spec.dtype,
                    shape.join(","),
                    t.begin,
                    t.end
                )
                .as_bytes(),
            );
        }
        out.push(b'}');
        out.resize(out.len().next_multiple_of(8), b' ');
        let header = out.len() as u64 - 8;
        if header > MAX_HEADER {
            return Err(Error::HeaderTooLarge { header });
        }
        out[..8].copy_from_slice(&header.to_le_bytes());
        Ok(out)
    }
}

/// Appends `text` as a JSON string.
fn push_json(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(serde_json::Value::from(text).to_string().as_bytes());
}

/// Carries the precise fault past the parser, whose own errors are text.
struct Cx {
    fault: RefCell<Option<Error>>,
}

impl Cx {
    fn refuse<E: serde::de::Error>(&self, fault: Error) -> E {
        let text = fault.to_string();
        *self.fault.borrow_mut() = Some(fault);
        E::custom(text)
    }
}

struct HeaderSeed<'c>(&'c Cx);

type Parsed = (Vec<Tensor>, Vec<(String, String)>);

impl<'de> DeserializeSeed<'de> for HeaderSeed<'_> {
    type Value = Parsed;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<Parsed, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderSeed<'_> {
    type Value = Parsed;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Parsed, A::Error> {
        let mut tensors = Vec::new();
        let mut metadata = None;
        while let Some(name) = map.next_key_seed(Text { cx: self.0, limit: MAX_NAME })? {
            if name == METADATA {
                if metadata.is_some() {
                    return Err(self.0.refuse(Error::DuplicateName(name)));
                }
                metadata = Some(map.next_value_seed(MetadataSeed(self.0))?);
                continue;
            }
            if tensors.len() == MAX_TENSORS {
                return Err(self.0.refuse(Error::TooManyTensors));
            }
            tensors.push(map.next_value_seed(TensorSeed { cx: self.0, name })?);
        }
        Ok((tensors, metadata.unwrap_or_default()))
    }
}

/// A string of limited length.
struct Text<'c> {
    cx: &'c Cx,
    limit: usize,
}

impl<'de> DeserializeSeed<'de> for Text<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<String, D::Error> {
        d.deserialize_str(self)
    }
}

impl Visitor<'_> for Text<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_str<E: serde::de::Error>(self, v: &str) -> std::result::Result<String, E> {
        if v.len() > self.limit {
            return Err(self.cx.refuse(Error::TextTooLong { len: v.len() }));
        }
        Ok(v.to_owned())
    }
}

struct MetadataSeed<'c>(&'c Cx);

impl<'de> DeserializeSeed<'de> for MetadataSeed<'_> {
    type Value = Vec<(String, String)>;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<Self::Value, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MetadataSeed<'_> {
    type Value = Vec<(String, String)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key_seed(Text { cx: self.0, limit: 2 * MAX_NAME })? {
            if entries.len() == MAX_METADATA {
                return Err(self.0.refuse(Error::TooManyMetadata));
            }
            entries.push((key, map.next_value_seed(Text { cx: self.0, limit: MAX_TEXT })?));
        }
        Ok(entries)
    }
}

struct TensorSeed<'c> {
    cx: &'c Cx,
    name: String,
}

impl<'de> DeserializeSeed<'de> for TensorSeed<'_> {
    type Value = Tensor;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<Tensor, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TensorSeed<'_> {
    type Value = Tensor;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Tensor, A::Error> {
        let Self { cx, name } = self;
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(key) = map.next_key_seed(Text { cx, limit: MAX_NAME })? {
            let twice = match key.as_str() {
                "dtype" => {
                    let text = map.next_value_seed(Text { cx, limit: MAX_NAME })?;
                    let Some(d) = Dtype::parse(&text) else {
                        return Err(cx.refuse(Error::UnknownDtype { name, dtype: text }));
                    };
                    dtype.replace(d).is_some()
                }
                "shape" => {
                    let Some(dims) = map.next_value_seed(Numbers { limit: MAX_DIMS })? else {
                        return Err(cx.refuse(Error::TooManyDims { name }));
                    };
                    shape.replace(dims).is_some()
                }
                "data_offsets" => match map.next_value_seed(Numbers { limit: 2 })?.as_deref() {
                    Some(&[begin, end]) => offsets.replace((begin, end)).is_some(),
                    _ => return Err(A::Error::custom("data_offsets must be two numbers")),
                },
                _ => map.next_value::<IgnoredAny>().map(|_| false)?,
            };
            if twice {
                return Err(cx.refuse(Error::DuplicateField { name, field: key }));
            }
        }
        let field = match (dtype, shape, offsets) {
            (Some(dtype), Some(shape), Some((begin, end))) => {
                return Ok(Tensor { spec: Spec { name, dtype, shape }, begin, end });
            }
            (None, ..) => "dtype",
            (_, None, _) => "shape",
            _ => "data_offsets",
        };
        Err(cx.refuse(Error::MissingField { name, field }))
    }
}

/// At most `limit` non-negative integers; `None` when there are more.
struct Numbers {
    limit: usize,
}

impl<'de> DeserializeSeed<'de> for Numbers {
    type Value = Option<Vec<u64>>;

    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<Self::Value, D::Error> {
        d.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Numbers {
    type Value = Option<Vec<u64>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of non-negative integers")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Self::Value, A::Error> {
        let mut out = Vec::new();
        while let Some(n) = seq.next_element::<u64>()? {
            if out.len() == self.limit {
                // The rest is read and dropped, so that the parser ends in order and the caller can name the tensor.
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                return Ok(None);
            }
            out.push(n);
        }
        Ok(Some(out))
    }
}
