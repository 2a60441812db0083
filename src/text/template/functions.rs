//! Functions that `transformers` gives to chat templates.

use std::ffi::CString;
use std::mem::MaybeUninit;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind, Value as Variable};

/// Longest formatted date, in bytes.
const MAX_DATE_BYTES: usize = 4096;

/// The message that a template gave to `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

pub(super) fn raise_exception(message: &str) -> Result<Variable, Error> {
    let raised = Raised(message.to_owned());
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()).with_source(raised))
}

/// The message of the `raise_exception` that ended a render.
pub(super) fn raised(error: &minijinja::Error) -> Option<&str> {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message);
        }
        source = error.source();
    }
    None
}

/// `strftime_now(format)`: the local time of this render, read once and formatted as Python's `strftime` does.
pub(super) fn strftime_now() -> Variable {
    let now = LocalTime::now();
    Variable::from_function(move |format: &str| now.format(format))
}

/// A moment in the machine's time zone.
#[derive(Clone, Copy)]
struct LocalTime {
    fields: libc::tm,
    microseconds: u32,
}

// SAFETY: the only pointer in `tm` is to the static name of a time zone, which is never read here.
unsafe impl Send for LocalTime {}
// SAFETY: as above.
unsafe impl Sync for LocalTime {}

impl LocalTime {
    fn now() -> Self {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let seconds = since.as_secs() as libc::time_t;
        let mut fields = MaybeUninit::<libc::tm>::zeroed();
        // SAFETY: both pointers are valid for the call, and an all-zero `tm` is a valid value if it fails.
        let fields = unsafe {
            libc::localtime_r(&raw const seconds, fields.as_mut_ptr());
            fields.assume_init()
        };
        Self {
            fields,
            microseconds: since.subsec_micros(),
        }
    }

    fn format(&self, format: &str) -> Result<String, Error> {
        let refuse = |reason: &str| {
            Error::new(
                ErrorKind::InvalidOperation,
                format!("strftime_now: {reason}"),
            )
        };
        // One more character distinguishes an empty result from one that does not fit.
        let format = format!("{} ", self.expand(format));
        let format = CString::new(format).map_err(|_| refuse("the format has a NUL character"))?;
        let mut out = vec![0u8; MAX_DATE_BYTES];
        // SAFETY: the buffer has the length given, the format ends with NUL, and `fields` is a valid time.
        let written = unsafe {
            libc::strftime(
                out.as_mut_ptr().cast(),
                out.len(),
                format.as_ptr(),
                &raw const self.fields,
            )
        };
        if written == 0 {
            return Err(refuse(&format!(
                "the date has more than {MAX_DATE_BYTES} bytes"
            )));
        }
        out.truncate(written - 1);
        String::from_utf8(out).map_err(|_| refuse("the date is not UTF-8"))
    }

    /// Replaces the directives that Python handles itself: microseconds, and a time zone, which its local time does not have.
    fn expand(&self, format: &str) -> String {
        let mut out = String::with_capacity(format.len());
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            match chars.next() {
                Some('f') => {
                    let digits = format!("{:06}", self.microseconds);
                    out.push_str(&digits);
                }
                Some('z' | 'Z') => {}
                Some(directive) => out.extend(['%', directive]),
                None => out.push_str("%%"),
            }
        }
        out
    }
}
