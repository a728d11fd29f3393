//! Round trips, one test for each way a file can be hostile, and the writer's promise.
use nibblas_io::{Dtype, Error, Header, Reader, Spec, Writer};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

/// A folder of its own for each test, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("nibblas-io-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("t.safetensors")
    }

    fn names(&self) -> Vec<String> {
        let mut v: Vec<_> =
            std::fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        v.sort();
        v
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn spec(name: &str, dtype: Dtype, shape: &[u64]) -> Spec {
    Spec { name: name.into(), dtype, shape: shape.into() }
}

/// A file with this header text and this much data.
fn raw(path: &Path, header: &str, data: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 7);
    std::fs::write(path, bytes).unwrap();
}

/// What opening a file with this header gives.
fn attack(header: &str, data: usize) -> Error {
    static N: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let folder = Folder::new(&format!("attack{}", N.fetch_add(1, std::sync::atomic::Ordering::Relaxed)));
    raw(&folder.file(), header, data);
    let e = Reader::open(folder.file()).expect_err("the file must be refused");
    assert!(e.to_string().len() < 400, "the message must stay short: {e}");
    e
}

fn entry(name: &str, dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
}

fn one(dtype: &str, shape: &str, offsets: &str) -> String {
    format!("{{{}}}", entry("w", dtype, shape, offsets))
}

macro_rules! refused {
    ($($test:ident: $make:expr => $pattern:pat,)*) => {
        $(
            #[test]
            fn $test() {
                let e = $make;
                assert!(matches!(e, $pattern), "{e:?}");
            }
        )*
    };
}

refused! {
    shape_past_offsets: attack(&one("U8", "[4]", "[0,3]"), 3) => Error::SizeMismatch { shape: 4, offsets: 3, .. },
    offsets_past_shape: attack(&one("F32", "[2]", "[0,16]"), 16) => Error::SizeMismatch { shape: 8, offsets: 16, .. },
    offset_past_end: attack(&one("U8", "[4]", "[0,4]"), 3) => Error::Truncated { need: 4, have: 3 },
    offset_2_to_63: attack(&one("U8", "[9223372036854775808]", "[0,9223372036854775808]"), 3) => Error::SizeOverflow { .. },
    offset_2_to_60: attack(&one("U8", "[1152921504606846976]", "[0,1152921504606846976]"), 3) => Error::Truncated { .. },
    offset_past_2_to_64: attack(&one("U8", "[4]", "[0,18446744073709551616]"), 3) => Error::Json(_),
    negative_offset: attack(&one("U8", "[4]", "[-4,0]"), 4) => Error::Json(_),
    negative_dim: attack(&one("U8", "[-4]", "[0,4]"), 4) => Error::Json(_),
    fractional_dim: attack(&one("U8", "[4.0]", "[0,4]"), 4) => Error::Json(_),
    reversed_offsets: attack(&one("U8", "[4]", "[4,0]"), 4) => Error::OffsetsReversed { .. },
    three_offsets: attack(&one("U8", "[4]", "[0,4,4]"), 4) => Error::Json(_),
    one_offset: attack(&one("U8", "[4]", "[4]"), 4) => Error::Json(_),
    product_overflow: attack(&one("F32", "[4294967296,4294967296]", "[0,0]"), 0) => Error::SizeOverflow { .. },
    product_overflow_wraps_to_fit: attack(&one("U8", "[4294967296,4294967296,4]", "[0,4]"), 4) => Error::SizeOverflow { .. },
    bit_product_overflow: attack(&one("F64", "[2305843009213693952]", "[0,0]"), 0) => Error::SizeOverflow { .. },
    nine_dims: attack(&one("U8", "[1,1,1,1,1,1,1,1,1]", "[0,1]"), 1) => Error::TooManyDims { .. },
    endless_dims: attack(&one("U8", &format!("[1{}]", ",1".repeat(1_000_000)), "[0,1]"), 1) => Error::TooManyDims { .. },
    half_a_byte: attack(&one("F4", "[3]", "[0,2]"), 2) => Error::PartialByte { .. },
    unknown_type: attack(&one("Q4", "[1]", "[0,1]"), 1) => Error::UnknownDtype { .. },
    endless_type: attack(&one(&"Q".repeat(200_000), "[1]", "[0,1]"), 1) => Error::TextTooLong { .. },
    trailing_bytes: attack(&one("U8", "[4]", "[0,4]"), 5) => Error::TrailingBytes { extra: 1 },
    data_without_tensors: attack("{}", 5) => Error::TrailingBytes { extra: 5 },
    hole_at_the_start: attack(&one("U8", "[4]", "[1,5]"), 5) => Error::Hole { .. },
    hole_in_the_middle:
        attack(&format!("{{{},{}}}", entry("a", "U8", "[2]", "[0,2]"), entry("b", "U8", "[2]", "[3,5]")), 5)
        => Error::Hole { .. },
    overlap: attack(&format!("{{{},{}}}", entry("a", "U8", "[4]", "[0,4]"), entry("b", "U8", "[4]", "[2,6]")), 6)
        => Error::Overlap { .. },
    same_bytes_twice: attack(&format!("{{{},{}}}", entry("a", "U8", "[4]", "[0,4]"), entry("b", "U8", "[4]", "[0,4]")), 4)
        => Error::Overlap { .. },
    duplicate_name: attack(&format!("{{{},{}}}", entry("a", "U8", "[4]", "[0,4]"), entry("a", "U8", "[4]", "[4,8]")), 8)
        => Error::DuplicateName(_),
    duplicate_name_by_escape:
        attack(&format!("{{{},{}}}", entry("a", "U8", "[4]", "[0,4]"), entry("\\u0061", "U8", "[4]", "[4,8]")), 8)
        => Error::DuplicateName(_),
    duplicate_field: attack(r#"{"w":{"dtype":"U8","shape":[4],"shape":[4],"data_offsets":[0,4]}}"#, 4)
        => Error::DuplicateField { .. },
    duplicate_metadata_key: attack(r#"{"__metadata__":{"a":"1","a":"2"}}"#, 0) => Error::DuplicateField { .. },
    duplicate_metadata: attack(r#"{"__metadata__":{},"__metadata__":{}}"#, 0) => Error::DuplicateName(_),
    metadata_not_text: attack(r#"{"__metadata__":{"a":1}}"#, 0) => Error::Json(_),
    metadata_not_an_object: attack(r#"{"__metadata__":"a"}"#, 0) => Error::Json(_),
    no_dtype: attack(r#"{"w":{"shape":[4],"data_offsets":[0,4]}}"#, 4) => Error::MissingField { field: "dtype", .. },
    no_shape: attack(r#"{"w":{"dtype":"U8","data_offsets":[0,4]}}"#, 4) => Error::MissingField { field: "shape", .. },
    no_offsets: attack(r#"{"w":{"dtype":"U8","shape":[4]}}"#, 4) => Error::MissingField { field: "data_offsets", .. },
    entry_not_an_object: attack(r#"{"w":3}"#, 0) => Error::Json(_),
    deep_nesting: attack(&format!(r#"{{"w":{{"x":{}"#, "[".repeat(500_000)), 0) => Error::Json(_),
    not_an_object: attack("[]", 0) => Error::Json(_),
    leading_space: attack(" {}", 0) => Error::Json(_),
    two_objects: attack("{}{}", 0) => Error::Json(_),
    cut_json: attack(r#"{"w":{"dtype":"U8","#, 0) => Error::Json(_),
    empty_header: attack("", 0) => Error::Json(_),
    lone_surrogate: attack(&one("\\ud800", "[1]", "[0,1]"), 1) => Error::Json(_),
    long_name: attack(&format!("{{{}}}", entry(&"n".repeat(65_537), "U8", "[1]", "[0,1]")), 1)
        => Error::TextTooLong { len: 65_537 },
    long_metadata: attack(&format!(r#"{{"__metadata__":{{"a":"{}"}}}}"#, "x".repeat((4 << 20) + 1)), 0) => Error::TextTooLong { .. },
    many_metadata:
        attack(&format!(r#"{{"__metadata__":{{{}}}}}"#, (0..70_000).map(|i| format!(r#""{i}":"""#)).collect::<Vec<_>>().join(",")), 0)
        => Error::TooManyMetadata,
    many_tensors:
        attack(&format!("{{{}}}", (0..65_537).map(|i| entry(&i.to_string(), "U8", "[0]", "[0,0]")).collect::<Vec<_>>().join(",")), 0)
        => Error::TooManyTensors,
}

#[test]
fn bytes_that_are_not_utf8() {
    let folder = Folder::new("utf8");
    let mut bytes = 6u64.to_le_bytes().to_vec();
    bytes.extend_from_slice(b"{\"\xff\":1");
    std::fs::write(folder.file(), bytes).unwrap();
    assert!(matches!(Reader::open(folder.file()), Err(Error::Json(_))));
}

#[test]
fn length_fields() {
    let folder = Folder::new("length");
    for (field, pattern) in
        [(u64::MAX, "limit"), (1 << 63, "limit"), (100_000_001, "limit"), (100_000_000, "file of"), (1, "file of")]
    {
        std::fs::write(folder.file(), field.to_le_bytes()).unwrap();
        let e = Reader::open(folder.file()).unwrap_err();
        assert!(e.to_string().contains(pattern), "{e}");
    }
    for n in 0..8 {
        std::fs::write(folder.file(), vec![0; n]).unwrap();
        assert!(matches!(Reader::open(folder.file()), Err(Error::TooShort { .. })));
    }
}

#[test]
fn what_is_not_a_file() {
    let folder = Folder::new("notafile");
    assert!(matches!(Reader::open(&folder.0), Err(Error::NotAFile(_))));
    assert!(matches!(Writer::create(&folder.0, vec![], vec![]), Err(Error::NotAFile(_))));
    assert!(matches!(Reader::open(folder.file()), Err(Error::Io(e)) if e.kind() == std::io::ErrorKind::NotFound));
    let missing = folder.0.join("no/such/folder.safetensors");
    assert!(matches!(Writer::create(missing, vec![], vec![]), Err(Error::Io(_))));
    #[cfg(unix)]
    {
        assert!(matches!(Reader::open("/dev/zero"), Err(Error::NotAFile(_))));
        assert!(matches!(Writer::create("/dev/null", vec![], vec![]), Err(Error::NotAFile(_))));
    }
}

#[test]
fn a_file_that_shrinks_under_the_reader() {
    let folder = Folder::new("shrink");
    raw(&folder.file(), &one("U8", "[100]", "[0,100]"), 100);
    let reader = Reader::open(folder.file()).unwrap();
    let len = std::fs::metadata(folder.file()).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(folder.file()).unwrap().set_len(len - 1).unwrap();
    let mut out = [0; 100];
    assert!(matches!(reader.read_into("w", 0, &mut out), Err(Error::Truncated { .. })));
    assert!(reader.read_into("w", 0, &mut out[..99]).is_ok());
}

#[test]
fn reads_stay_inside_the_tensor() {
    let folder = Folder::new("range");
    raw(&folder.file(), &one("U8", "[10]", "[0,10]"), 10);
    let r = Reader::open(folder.file()).unwrap();
    for (offset, len) in [(0, 11), (10, 1), (11, 0), (u64::MAX, 1)] {
        assert!(matches!(r.read_into("w", offset, &mut vec![0; len]), Err(Error::OutOfRange { .. })));
    }
    assert!(matches!(r.read_into("v", 0, &mut []), Err(Error::NoSuchTensor(_))));
    r.read_into("w", 10, &mut []).unwrap();
    assert_eq!(r.read("w").unwrap(), [7; 10]);
}

#[test]
fn limits_hold_at_their_edge() {
    let folder = Folder::new("edge");
    let name = "n".repeat(65_536);
    raw(&folder.file(), &format!("{{{}}}", entry(&name, "U8", "[1,1,1,1,1,1,1,1]", "[0,1]")), 1);
    assert_eq!(Reader::open(folder.file()).unwrap().read(&name).unwrap(), [7]);
    let all: Vec<_> = (0..65_536).map(|i| entry(&i.to_string(), "U8", "[0]", "[0,0]")).collect();
    raw(&folder.file(), &format!("{{{}}}", all.join(",")), 0);
    assert_eq!(Reader::open(folder.file()).unwrap().header().tensors().len(), 65_536);
    // Keys that nobody defined, an absent object and spaces at the end are legal.
    raw(&folder.file(), r#"{"w":{"x":[{"y":null}],"dtype":"U8","shape":[],"data_offsets":[0,1]}}   "#, 1);
    assert_eq!(Reader::open(folder.file()).unwrap().header().tensors()[0].spec.shape, [0u64; 0]);
    raw(&folder.file(), "{}", 0);
    assert!(Reader::open(folder.file()).unwrap().header().tensors().is_empty());
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let folder = Folder::new("refuse");
    let a = || spec("a", Dtype::U8, &[1]);
    let make = |specs, metadata| Writer::create(folder.file(), specs, metadata).map(drop).unwrap_err();
    let pair = |k: &str| (k.to_string(), String::new());
    assert!(matches!(make(vec![a(), a()], vec![]), Error::DuplicateName(_)));
    assert!(matches!(make(vec![spec("__metadata__", Dtype::U8, &[1])], vec![]), Error::ReservedName(_)));
    assert!(matches!(make(vec![spec("a", Dtype::U8, &[1; 9])], vec![]), Error::TooManyDims { .. }));
    assert!(matches!(make(vec![spec("a", Dtype::F6E2M3, &[2])], vec![]), Error::PartialByte { .. }));
    assert!(matches!(make(vec![spec("a", Dtype::U64, &[1 << 61])], vec![]), Error::SizeOverflow { .. }));
    assert!(matches!(make(vec![spec(&"n".repeat(65_537), Dtype::U8, &[1])], vec![]), Error::TextTooLong { .. }));
    assert!(matches!(make(vec![a()], vec![pair("k"), pair("k")]), Error::DuplicateField { .. }));
    let text = |n: usize| ("k".to_string(), "v".repeat(n));
    assert!(matches!(make(vec![a()], vec![text((4 << 20) + 1)]), Error::TextTooLong { .. }));
    assert!(Writer::create(folder.file(), vec![a()], vec![text(4 << 20)]).is_ok());
    let half = |n: &str| spec(n, Dtype::U8, &[(1 << 61) - 1]);
    assert!(matches!(
        Header::layout((0..9).map(|i| half(&i.to_string())).collect(), vec![]),
        Err(Error::SizeOverflow { .. })
    ));
    assert_eq!(folder.names(), Vec::<String>::new());
}

#[test]
fn the_target_is_replaced_whole_or_not_at_all() {
    let folder = Folder::new("atomic");
    std::fs::write(folder.file(), b"before").unwrap();
    let start = || Writer::create(folder.file(), vec![spec("a", Dtype::U16, &[2])], vec![]).unwrap();

    let mut w = start();
    assert_eq!(folder.names().len(), 2);
    w.append("a", &[1, 2]).unwrap();
    drop(w);
    assert_eq!(folder.names(), ["t.safetensors"]);
    assert_eq!(std::fs::read(folder.file()).unwrap(), b"before");

    let mut w = start();
    w.append("a", &[1, 2, 3]).unwrap();
    assert!(matches!(w.append("a", &[1, 2]), Err(Error::OutOfRange { .. })));
    assert!(matches!(w.append("b", &[]), Err(Error::NoSuchTensor(_))));
    assert!(matches!(w.finish(), Err(Error::Incomplete { missing: 1, .. })));
    assert_eq!(folder.names(), ["t.safetensors"]);
    assert_eq!(std::fs::read(folder.file()).unwrap(), b"before");

    let mut w = start();
    w.append("a", &[1, 2]).unwrap();
    w.append("a", &[3, 4]).unwrap();
    w.finish().unwrap();
    assert_eq!(folder.names(), ["t.safetensors"]);
    assert_eq!(Reader::open(folder.file()).unwrap().read("a").unwrap(), [1, 2, 3, 4]);
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_permissions_kept() {
    use std::os::unix::fs::PermissionsExt;
    let folder = Folder::new("link");
    let link = folder.0.join("link.safetensors");
    std::fs::write(folder.file(), b"before").unwrap();
    std::fs::set_permissions(folder.file(), std::fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::symlink(folder.file(), &link).unwrap();
    Writer::create(&link, vec![], vec![]).unwrap().finish().unwrap();
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    assert!(Reader::open(folder.file()).unwrap().header().tensors().is_empty());
    assert_eq!(std::fs::metadata(folder.file()).unwrap().permissions().mode() & 0o777, 0o640);
}

#[test]
fn data_are_aligned_to_their_elements() {
    let specs = vec![spec("a", Dtype::U8, &[3]), spec("b", Dtype::F64, &[1]), spec("c", Dtype::F16, &[5])];
    let header = Header::layout(specs, vec![("k".into(), "v".into())]).unwrap();
    assert_eq!(header.to_bytes().unwrap().len() % 8, 0);
    for t in header.tensors() {
        assert_eq!(t.begin % u64::from(t.spec.dtype.bits() / 8), 0);
    }
}

fn any_spec() -> impl Strategy<Value = (String, Dtype, Vec<u64>)> {
    let dtype = (0..Dtype::ALL.len()).prop_map(|i| Dtype::ALL[i]);
    (".{0,12}", dtype, prop::collection::vec(0u64..5, 0..5)).prop_map(|(name, dtype, mut shape)| {
        if dtype.bits() < 8 {
            shape.push(4);
        }
        (name, dtype, shape)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn round_trip(
        tensors in prop::collection::vec(any_spec(), 0..12),
        metadata in prop::collection::btree_map(".{0,9}", ".{0,20}", 0..6),
        seed in any::<u8>(),
    ) {
        let folder = Folder::new("round");
        let specs: Vec<Spec> = tensors
            .into_iter()
            .enumerate()
            .map(|(i, (name, dtype, shape))| Spec { name: format!("{name}{i}"), dtype, shape })
            .collect();
        let metadata: Vec<(String, String)> = metadata.into_iter().collect();
        let bytes = |s: &Spec| -> Vec<u8> {
            (0..s.nbytes().unwrap()).map(|i| (i as u8).wrapping_mul(31) ^ s.name.len() as u8 ^ seed).collect()
        };
        let mut w = Writer::create(folder.file(), specs.clone(), metadata.clone()).unwrap();
        for s in specs.iter().rev() {
            for part in bytes(s).chunks(7) {
                w.append(&s.name, part).unwrap();
            }
        }
        w.finish().unwrap();
        let r = Reader::open(folder.file()).unwrap();
        prop_assert_eq!(r.header().metadata(), &metadata[..]);
        prop_assert_eq!(r.header().tensors().len(), specs.len());
        for s in &specs {
            prop_assert_eq!(&r.header().tensors()[r.header().position(&s.name).unwrap()].spec, s);
            prop_assert_eq!(r.read(&s.name).unwrap(), bytes(s));
        }
    }

    #[test]
    fn any_text_is_parsed_or_refused(text in "\\{.{0,200}", data in 0u64..64) {
        let _ = Header::parse(text.as_bytes(), data);
    }

    #[test]
    fn a_changed_byte_is_parsed_or_refused(at in 0usize..400, value in any::<u8>()) {
        let specs = vec![spec("a", Dtype::F32, &[2, 3]), spec("b", Dtype::U8, &[5]), spec("c", Dtype::BF16, &[4])];
        let header = Header::layout(specs, vec![("k".into(), "v".into())]).unwrap();
        let mut json = header.to_bytes().unwrap().split_off(8);
        let at = at % json.len();
        json[at] = value;
        if let Ok(h) = Header::parse(&json[..], header.data_len()) {
            // Whatever was accepted still tiles the data.
            let total: u64 = h.tensors().iter().map(nibblas_io::Tensor::nbytes).sum();
            prop_assert_eq!(total, header.data_len());
        }
    }
}
