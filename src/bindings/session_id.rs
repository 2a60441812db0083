//! Ids of sessions as Python has them: `int` or `str`.

use std::convert::Infallible;

use pyo3::prelude::*;
use pyo3::types::{PyAny, PyString};

use crate::request::SessionId;

impl<'py> FromPyObject<'_, 'py> for SessionId {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        match object.cast::<PyString>() {
            Ok(text) => Ok(Self::parse(text.to_str()?)?),
            Err(_) => object.extract().map(Self::Number),
        }
    }
}

impl<'py> IntoPyObject<'py> for &SessionId {
    type Target = PyAny;
    type Output = Bound<'py, PyAny>;
    type Error = Infallible;

    fn into_pyobject(self, py: Python<'py>) -> std::result::Result<Bound<'py, PyAny>, Infallible> {
        match self {
            SessionId::Number(number) => Ok(number.into_pyobject(py)?.into_any()),
            SessionId::Name(name) => Ok(PyString::new(py, name).into_any()),
        }
    }
}
