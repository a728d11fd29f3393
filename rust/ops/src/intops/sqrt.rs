//! The exact floor of the square root, digit by digit: no division, no first guess, no branch, so that every lane of a
//! vector goes the same way.
use crate::level::{at, Loop};
use crate::{Error, Exec, Result};

macro_rules! roots {
    ($name:ident, $slice:ident, $t:ty, $doc:literal) => {
        #[inline(always)]
        fn $name(v: $t) -> $t {
            let (mut rest, mut root) = (v, 0);
            let mut bit: $t = 1 << (<$t>::BITS - 2);
            while bit != 0 {
                let trial = root + bit;
                let fits = rest >= trial;
                rest -= if fits { trial } else { 0 };
                root = (root >> 1) + if fits { bit } else { 0 };
                bit >>= 2;
            }
            root
        }

        #[doc = $doc]
        ///
        /// # Errors
        /// [`Error::Shape`] for different lengths.
        pub fn $slice(exec: &Exec, x: &[$t], y: &mut [$t]) -> Result<()> {
            struct Roots<'a>(&'a [$t], &'a mut [$t]);
            impl Loop for Roots<'_> {
                type Out = ();
                #[inline(always)]
                fn run(self) {
                    for (o, &v) in self.1.iter_mut().zip(self.0) {
                        *o = $name(v);
                    }
                }
            }
            if x.len() != y.len() {
                return Err(Error::Shape(format!("{} values do not fit {} results", x.len(), y.len())));
            }
            let part = exec.part(x.len(), 1);
            exec.each(y.chunks_mut(part).collect(), |i, y| {
                at(exec.isa, Roots(&x[i * part..i * part + y.len()], y));
                Ok(())
            })
        }
    };
}

roots!(root32, sqrt32, u32, "Floors of the roots of 32-bit numbers.");
roots!(root64, sqrt64, u64, "Floors of the roots of 64-bit numbers.");
