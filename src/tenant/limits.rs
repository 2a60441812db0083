//! What a tenant may do, as it crosses into the core: one JSON list, bounded here once.

use std::collections::HashSet;

use serde::Deserialize;

use crate::error::{Error, Result};

/// Largest weight of a tenant.
pub const MAX_WEIGHT: u32 = 1000;
/// Largest number of tokens a minute.
pub const MAX_TOKENS_PER_MINUTE: u64 = 1_000_000_000_000;

/// What a tenant may do. Absent: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TenantLimits {
    /// Its share where tenants compete, relative to the others' weights.
    pub weight: u32,
    /// Most requests that wait or run at a time.
    pub max_in_flight: Option<usize>,
    /// Most tokens a minute: what requests bring in (without their session's history) and what they generate.
    pub tokens_per_minute: Option<u64>,
    /// Most sessions; the least recently used idle one goes first.
    pub max_sessions: Option<usize>,
    /// The most urgent priority a request may ask for; smaller is more urgent.
    pub max_priority: Option<i32>,
}

impl Default for TenantLimits {
    fn default() -> Self {
        Self {
            weight: 1,
            max_in_flight: None,
            tokens_per_minute: None,
            max_sessions: None,
            max_priority: None,
        }
    }
}

/// One tenant.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tenant {
    /// Its number in this process, as requests carry it.
    pub number: u32,
    /// What it may do.
    #[serde(default)]
    pub limits: TenantLimits,
}

fn check_range(name: &str, value: u64, low: u64, high: u64) -> Result<()> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    let message = format!("{name} must lie in [{low}, {high}], but {value} was given");
    Err(Error::invalid(name, message))
}

impl Tenant {
    /// Parses and bounds a JSON list of tenants.
    ///
    /// # Errors
    /// `invalid_value` (400) names the field, its limit and what was given.
    pub fn parse_list(json: &[u8]) -> Result<Vec<Self>> {
        let tenants: Vec<Self> = serde_json::from_slice(json)
            .map_err(|e| Error::invalid("tenants", format!("malformed tenants: {e}")))?;
        let mut numbers = HashSet::new();
        for Self { number, limits } in &tenants {
            if !numbers.insert(number) {
                let message = format!("tenant {number} is given twice");
                return Err(Error::invalid("tenants", message));
            }
            check_range("weight", u64::from(limits.weight), 1, u64::from(MAX_WEIGHT))?;
            if let Some(tokens) = limits.tokens_per_minute {
                check_range("tokens_per_minute", tokens, 1, MAX_TOKENS_PER_MINUTE)?;
            }
            for (name, value) in [
                ("max_in_flight", limits.max_in_flight),
                ("max_sessions", limits.max_sessions),
            ] {
                if let Some(value) = value {
                    check_range(name, value as u64, 1, u64::from(u32::MAX))?;
                }
            }
        }
        Ok(tenants)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_parsed_with_its_defaults_and_refused_out_of_bounds() {
        let list = br#"[{"number": 1, "limits": {"weight": 3}}, {"number": 2}]"#;
        let tenants = Tenant::parse_list(list).unwrap();
        assert_eq!(tenants[0].limits.weight, 3);
        assert_eq!(tenants[1].limits, TenantLimits::default());
        for (limits, param) in [
            (r#"{"weight": 0}"#, "weight"),
            (r#"{"weight": 1001}"#, "weight"),
            (r#"{"tokens_per_minute": 0}"#, "tokens_per_minute"),
            (r#"{"max_in_flight": 0}"#, "max_in_flight"),
            (r#"{"max_sessions": 0}"#, "max_sessions"),
            (r#"{"speed": 1}"#, "tenants"),
        ] {
            let list = format!(r#"[{{"number": 1, "limits": {limits}}}]"#);
            let error = Tenant::parse_list(list.as_bytes()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param));
        }
        let twice = br#"[{"number": 1}, {"number": 1}]"#;
        assert!(Tenant::parse_list(twice).is_err());
    }
}
