//! Slices of integers whose width is known at run time.
//!
//! Loops work on i32: a row is widened into a buffer in the first cache, and the result narrowed from one. That costs a
//! load and a store per value and keeps one body per operator, where all pairs of types would be twenty-five.
use std::ops::Range;

macro_rules! ints {
    ($($kind:ident $t:ty),*) => {
        /// Integers to read.
        #[derive(Debug, Clone, Copy)]
        pub enum Ints<'a> {
            $(
                #[doc = concat!("Of type ", stringify!($t), ".")]
                $kind(&'a [$t]),
            )*
        }

        /// Integers to write.
        #[derive(Debug)]
        pub enum IntsMut<'a> {
            $(
                #[doc = concat!("Of type ", stringify!($t), ".")]
                $kind(&'a mut [$t]),
            )*
        }

        impl<'a> Ints<'a> {
            /// Number of values.
            #[inline]
            pub fn len(&self) -> usize {
                match self { $(Self::$kind(s) => s.len(),)* }
            }

            /// The lowest and the highest value of the type.
            pub fn limits(&self) -> (i32, i32) {
                match self { $(Self::$kind(_) => (i32::from(<$t>::MIN), i32::from(<$t>::MAX)),)* }
            }

            /// A part of the slice.
            #[inline(always)]
            #[must_use]
            pub fn slice(self, range: Range<usize>) -> Self {
                match self { $(Self::$kind(s) => Self::$kind(&s[range]),)* }
            }

            /// All values as i32: the slice itself where it has them, else `buffer`, which must be as long.
            #[inline(always)]
            pub fn widen<'b>(self, buffer: &'b mut [i32]) -> &'b [i32]
            where
                'a: 'b,
            {
                match self {
                    Self::I32(s) => s,
                    $(#[allow(unreachable_patterns)] Self::$kind(s) => {
                        for (o, &v) in buffer.iter_mut().zip(s) {
                            *o = i32::from(v);
                        }
                        buffer
                    })*
                }
            }
        }

        impl<'a> IntsMut<'a> {
            /// Number of values.
            #[inline]
            pub fn len(&self) -> usize {
                match self { $(Self::$kind(s) => s.len(),)* }
            }

            /// The lowest and the highest value of the type.
            #[inline(always)]
            pub fn limits(&self) -> (i32, i32) {
                match self { $(Self::$kind(_) => (i32::from(<$t>::MIN), i32::from(<$t>::MAX)),)* }
            }

            /// Bits of a value, the sign's not counted.
            pub fn digits(&self) -> u32 {
                match self { $(Self::$kind(_) => <$t>::MAX.count_ones(),)* }
            }

            /// Parts of `len` values each, the last one shorter.
            pub fn parts(self, len: usize) -> Vec<Self> {
                match self { $(Self::$kind(s) => s.chunks_mut(len.max(1)).map(Self::$kind).collect(),)* }
            }

            /// Writes values that lie within [`Self::limits`], from position `start` on.
            #[inline(always)]
            pub fn put(&mut self, start: usize, values: &[i32]) {
                match self {
                    $(Self::$kind(s) => {
                        for (o, &v) in s[start..start + values.len()].iter_mut().zip(values) {
                            *o = v as $t;
                        }
                    })*
                }
            }
        }
    };
}

ints!(I8 i8, U8 u8, I16 i16, U16 u16, I32 i32);

impl Ints<'_> {
    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl IntsMut<'_> {
    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Values that loops without rows take at a time: three buffers of them fit the first cache.
pub(crate) const BLOCK: usize = 1024;
