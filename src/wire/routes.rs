//! The list of all wire formats.

use super::chat::Chat;
use super::completions::Completions;
use super::format::WireFormat;
use super::generate::Generate;
use super::interactive::Interactive;
use super::messages::Messages;
use super::responses::Responses;
use super::said::Reads;
use crate::error::{Error, Result};

/// All wire formats.
const FORMATS: [&dyn WireFormat; 6] = [
    &Generate,
    &Chat,
    &Completions,
    &Responses,
    &Messages,
    &Interactive,
];

/// The wire format with this name.
fn find(route: &str) -> Option<&'static dyn WireFormat> {
    FORMATS.into_iter().find(|format| format.name() == route)
}

/// The wire format of a route.
///
/// # Errors
/// `invalid_value` (400) lists those that exist.
pub(super) fn format_of(route: &str) -> Result<&'static dyn WireFormat> {
    find(route).ok_or_else(|| {
        let names: Vec<&str> = FORMATS.iter().map(|format| format.name()).collect();
        let message = format!(
            "route must be one of {}, but {route:?} was given",
            names.join(", ")
        );
        Error::invalid("route", message)
    })
}

/// How the answers of a route are parsed.
pub fn reads(route: &str) -> Reads {
    find(route).map_or(Reads::Text, WireFormat::reads)
}
